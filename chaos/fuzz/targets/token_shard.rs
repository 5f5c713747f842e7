#![no_main]

libfuzzer_sys::fuzz_target!(init: tarazed_fuzz::begin(&tarazed_fuzz::token_shard::seeds), |data: &[u8]| {
    tarazed_fuzz::token_shard::run(data);
});
