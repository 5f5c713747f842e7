#![no_main]

libfuzzer_sys::fuzz_target!(init: tarazed_fuzz::begin(&tarazed_fuzz::manifest::seeds), |data: &[u8]| {
    tarazed_fuzz::manifest::run(data);
});
