#![no_main]
//! Has a bug on purpose, behind bytes that chance alone does not find: `chaos/fuzz/run` demands that it is found, or else the
//! silence of all the other targets means nothing.

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if data.first() == Some(&b'b') && data.get(1) == Some(&b'u') && data.get(2) == Some(&b'g') {
        let last = data.get(3).copied().unwrap_or_default();
        // An overflow, so that this also says whether overflow checks are on.
        std::hint::black_box(u8::MAX - 7 + last.min(8));
    }
});
