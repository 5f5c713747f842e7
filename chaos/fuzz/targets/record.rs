#![no_main]

libfuzzer_sys::fuzz_target!(init: tarazed_fuzz::begin(&tarazed_fuzz::record::seeds), |data: &[u8]| {
    tarazed_fuzz::record::run(data);
});
