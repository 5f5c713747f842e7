#![no_main]

libfuzzer_sys::fuzz_target!(init: tarazed_fuzz::begin(&tarazed_fuzz::frame::seeds), |data: &[u8]| {
    tarazed_fuzz::frame::run(data);
});
