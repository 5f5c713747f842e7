#![no_main]

libfuzzer_sys::fuzz_target!(init: tarazed_fuzz::begin(&tarazed_fuzz::link_handshake::seeds), |data: &[u8]| {
    tarazed_fuzz::link_handshake::run(data);
});
