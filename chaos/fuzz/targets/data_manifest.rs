#![no_main]

libfuzzer_sys::fuzz_target!(init: tarazed_fuzz::begin(&tarazed_fuzz::data_manifest::seeds), |data: &[u8]| {
    tarazed_fuzz::data_manifest::run(data);
});
