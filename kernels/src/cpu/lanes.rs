//! Sixteen virtual f32 lanes, on AVX-512, on AVX2 with FMA, and in portable code.
//!
//! Invariant **DET-1**: the three give the same bits. Every operation is an IEEE operation on each lane alone (the fused
//! multiply-add included), and a sum over lanes folds halves onto each other in one fixed order: 16, 8, 4, 2, 1.
//!
//! Kernels are written once, generic over [`Lanes`], with `#[inline(always)]` throughout (closures are avoided, for they
//! cannot be forced inline), and compiled per instruction set by [`multiversion!`].

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// The instruction set a device uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Isa {
    /// AVX-512 (F, BW, DQ, VL).
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Whatever the target has.
    Portable,
}

impl Isa {
    /// Those that this machine can run, best first.
    pub(crate) fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                found.push(Self::Avx512);
            }
            if avx2 {
                found.push(Self::Avx2);
            }
        }
        found.push(Self::Portable);
        found
    }

    /// Its name.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }
}

/// Sixteen f32 lanes and what kernels do with them.
///
/// An implementation may only be named where its [`Isa`] was found on this machine; [`multiversion!`] sees to that.
pub(crate) trait Lanes: Copy {
    /// Sixteen u32 words.
    type Words: Copy;
    /// Eight u64 sums.
    type Sums: Copy;
    /// Sixteen f64 sums.
    type Wide: Copy;

    /// Whether the registers hold twelve rows of two vectors; else six rows of one.
    const WIDE_TILE: bool;

    fn splat(x: f32) -> Self;
    fn load(from: &[f32; LANES]) -> Self;
    fn store(self, to: &mut [f32; LANES]);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// `self * b + c`, rounded once.
    fn fma(self, b: Self, c: Self) -> Self;
    /// `c - self * b`, rounded once.
    fn fnma(self, b: Self, c: Self) -> Self;
    /// The larger; `other` where either is not a number.
    fn max(self, other: Self) -> Self;
    /// The smaller; `other` where either is not a number.
    fn min(self, other: Self) -> Self;
    fn sqrt(self) -> Self;
    /// Nearest integer, ties to even.
    fn round(self) -> Self;
    /// `2^self` for integers from -126 to 127.
    fn exp2_integer(self) -> Self;
    /// `self`, but zero where `x < limit`.
    fn zero_below(self, x: Self, limit: Self) -> Self;
    /// Sum of the lanes, folding halves.
    fn sum(self) -> f32;
    /// Largest lane, folding halves.
    fn largest(self) -> f32;
    /// Transposes 16 rows of 16.
    fn transpose(rows: &mut [Self; LANES]);

    fn words(self) -> Self::Words;
    fn splat_word(x: u32) -> Self::Words;
    fn load_words(from: &[u32; LANES]) -> Self::Words;
    fn word_add(a: Self::Words, b: Self::Words) -> Self::Words;
    fn word_mul(a: Self::Words, b: Self::Words) -> Self::Words;
    fn word_xor(a: Self::Words, b: Self::Words) -> Self::Words;
    fn word_and(a: Self::Words, b: Self::Words) -> Self::Words;
    fn word_or(a: Self::Words, b: Self::Words) -> Self::Words;
    fn word_shift_right<const N: u32>(a: Self::Words) -> Self::Words;
    /// Zero sums.
    fn no_sums() -> Self::Sums;
    /// Adds `words[2i] * words[2i + 1]` to sum `i`, modulo 2⁶⁴.
    fn add_products(sums: Self::Sums, words: Self::Words) -> Self::Sums;
    /// The total, modulo 2⁶⁴.
    fn total(sums: Self::Sums) -> u64;

    /// Zero f64 sums.
    fn no_wide() -> Self::Wide;
    /// Adds each lane's square (exact in f64) to its sum.
    fn add_squares(sums: Self::Wide, x: Self) -> Self::Wide;
    /// The total, folding halves.
    fn wide_total(sums: Self::Wide) -> f64;

    /// Loads from a pointer.
    ///
    /// # Safety
    /// Sixteen values must be readable there.
    #[inline(always)]
    unsafe fn load_at(from: *const f32) -> Self {
        // SAFETY: the caller's promise; f32 needs no more alignment than the pointer's type gives.
        Self::load(unsafe { &*from.cast::<[f32; LANES]>() })
    }

    /// Stores to a pointer.
    ///
    /// # Safety
    /// Sixteen values must be writable there, and nothing else may refer to them.
    #[inline(always)]
    unsafe fn store_at(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        self.store(unsafe { &mut *to.cast::<[f32; LANES]>() });
    }

    /// The first `from.len()` lanes, the rest zero.
    #[inline(always)]
    fn load_part(from: &[f32]) -> Self {
        let mut padded = [0.0; LANES];
        padded[..from.len()].copy_from_slice(from);
        Self::load(&padded)
    }

    /// Stores the first `to.len()` lanes.
    #[inline(always)]
    fn store_part(self, to: &mut [f32]) {
        let mut padded = [0.0; LANES];
        self.store(&mut padded);
        let len = to.len();
        to.copy_from_slice(&padded[..len]);
    }
}

/// Compiles `$generic::<V>` once per instruction set, as `$name(isa, …)`.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $generic:ident) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::cpu::lanes::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                $generic::<$crate::cpu::x86::Avx512>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                $generic::<$crate::cpu::x86::Avx2>($($arg),*)
            }
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: an `Isa` other than the portable one comes only from `Isa::available`.
                $crate::cpu::lanes::Isa::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                $crate::cpu::lanes::Isa::Avx2 => unsafe { avx2($($arg),*) },
                $crate::cpu::lanes::Isa::Portable => $generic::<$crate::cpu::portable::Portable>($($arg),*),
            }
        }
    };
}
pub(crate) use multiversion;
