#![no_main]

libfuzzer_sys::fuzz_target!(init: tarazed_fuzz::begin(&tarazed_fuzz::shard_header::seeds), |data: &[u8]| {
    tarazed_fuzz::shard_header::run(data);
});
