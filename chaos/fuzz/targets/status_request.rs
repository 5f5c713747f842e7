#![no_main]

libfuzzer_sys::fuzz_target!(init: tarazed_fuzz::begin(&tarazed_fuzz::status_request::seeds), |data: &[u8]| {
    tarazed_fuzz::status_request::run(data);
});
