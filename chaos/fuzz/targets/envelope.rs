#![no_main]

libfuzzer_sys::fuzz_target!(init: tarazed_fuzz::begin(&tarazed_fuzz::envelope::seeds), |data: &[u8]| {
    tarazed_fuzz::envelope::run(data);
});
