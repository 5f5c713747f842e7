#![no_main]

libfuzzer_sys::fuzz_target!(init: tarazed_fuzz::begin(&tarazed_fuzz::trace_line::seeds), |data: &[u8]| {
    tarazed_fuzz::trace_line::run(data);
});
