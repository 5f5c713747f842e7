#![no_main]

libfuzzer_sys::fuzz_target!(init: tarazed_fuzz::begin(&tarazed_fuzz::message::seeds), |data: &[u8]| {
    tarazed_fuzz::message::run(data);
});
