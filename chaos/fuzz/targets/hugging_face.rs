#![no_main]

libfuzzer_sys::fuzz_target!(init: tarazed_fuzz::begin(&tarazed_fuzz::hugging_face::seeds), |data: &[u8]| {
    tarazed_fuzz::hugging_face::run(data);
});
