//! Sixteen `f32` lanes, in three forms that round alike: AVX-512, AVX2 with FMA, and plain Rust.

use half::{bf16, f16};
use std::sync::OnceLock;

/// Lanes of one vector.
pub(crate) const LANES: usize = 16;

/// The instruction set that kernels use on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// 512-bit vectors.
    Avx512,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// Whatever the compiler makes of plain Rust.
    Portable,
}

impl Isa {
    /// The best that this machine has.
    pub fn detect() -> Self {
        static FOUND: OnceLock<Isa> = OnceLock::new();
        *FOUND.get_or_init(|| {
            #[cfg(target_arch = "x86_64")]
            {
                let wide = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
                let narrow = is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c");
                if wide && narrow {
                    return Self::Avx512;
                }
                if narrow {
                    return Self::Avx2;
                }
            }
            Self::Portable
        })
    }
}

/// Sixteen lanes. All operations round like IEEE 754 single precision; `fma` rounds once.
///
/// # Safety
/// The methods of an implementation may be called only on a machine that has its instructions, and pointers must be
/// valid for sixteen elements.
pub(crate) trait Lanes: Copy {
    /// Rows of a matmul tile that this register file holds.
    const TILE_ROWS: usize;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn load_bf16(from: *const bf16) -> Self;
    unsafe fn load_f16(from: *const f16) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// `a × b + self`
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn max(self, other: Self) -> Self;
    /// `2^n` for each lane, a whole number in -126..=127.
    unsafe fn exp2_whole(self) -> Self;
    unsafe fn round(self) -> Self;
}

/// Sum of all lanes in a fixed order: halves, quarters, eighths, sixteenths.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn sum_lanes<L: Lanes>(lanes: L) -> f32 {
    let mut values = [0f32; LANES];
    // SAFETY: the array has sixteen elements; the caller vouches for the instructions.
    unsafe { lanes.store(values.as_mut_ptr()) };
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            values[i] += values[i + width];
        }
        width /= 2;
    }
    values[0]
}

/// e^x, by 2^n · e^r with |r| ≤ ln2/2 and the degree-6 Taylor polynomial: relative error below 3e-7. Below the smallest
/// normal number, and for -inf, the result is 2^-126.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn exp<L: Lanes>(x: L) -> L {
    // SAFETY: the caller vouches for the instructions.
    unsafe {
        let x = x.max(L::splat(-87.0));
        let n = x.mul(L::splat(std::f32::consts::LOG2_E)).round();
        // ln2 in two parts, so that n·ln2 is exact enough (Cody and Waite).
        let r = x.fma(n, L::splat(-0.693_359_4)).fma(n, L::splat(2.121_944_4e-4));
        let mut p = L::splat(1.0 / 720.0);
        for coefficient in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = L::splat(coefficient).fma(p, r);
        }
        p.mul(n.max(L::splat(-126.0)).exp2_whole())
    }
}

/// A kernel's result, shared among jobs that each write their own part of it.
#[derive(Clone, Copy)]
pub(crate) struct Output(pub(crate) *mut f32);

// SAFETY: the jobs of one kernel call write disjoint parts, and nobody reads before all of them have ended. Each kernel says
// at its stores which part is its own.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

#[derive(Clone, Copy)]
pub(crate) struct Plain([f32; LANES]);

macro_rules! lanewise {
    ($f:expr) => {
        Plain(std::array::from_fn($f))
    };
}

// SAFETY of all methods: plain loads and stores of sixteen elements that the caller vouches for.
impl Lanes for Plain {
    const TILE_ROWS: usize = 2;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; LANES])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for sixteen elements.
        lanewise!(|i| unsafe { *from.add(i) })
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: the caller vouches for sixteen elements.
        lanewise!(|i| unsafe { (*from.add(i)).to_f32() })
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: the caller vouches for sixteen elements.
        lanewise!(|i| unsafe { (*from.add(i)).to_f32() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        for (i, value) in self.0.into_iter().enumerate() {
            // SAFETY: the caller vouches for sixteen elements.
            unsafe { *to.add(i) = value }
        }
    }
    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        lanewise!(|i| a.0[i].mul_add(b.0[i], self.0[i]))
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        lanewise!(|i| self.0[i] + other.0[i])
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        lanewise!(|i| self.0[i] * other.0[i])
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // The x86 rule: the second operand when either is NaN or both are zero.
        lanewise!(|i| if self.0[i] > other.0[i] { self.0[i] } else { other.0[i] })
    }
    #[inline(always)]
    unsafe fn exp2_whole(self) -> Self {
        lanewise!(|i| f32::from_bits(((self.0[i] as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        lanewise!(|i| self.0[i].round_ties_even())
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Lanes;
    use half::{bf16, f16};
    use std::arch::x86_64::*;

    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    // SAFETY of all methods: intrinsics of instructions, and unaligned accesses to sixteen elements, that the caller
    // vouches for.
    impl Lanes for Avx512 {
        const TILE_ROWS: usize = 12;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: see above.
            unsafe { Self(_mm512_set1_ps(value)) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: see above.
            unsafe { Self(_mm512_loadu_ps(from)) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            // SAFETY: see above. A bf16 is the upper half of an f32.
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
            }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self {
            // SAFETY: see above.
            unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: see above.
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            // SAFETY: see above.
            unsafe { Self(_mm512_fmadd_ps(a.0, b.0, self.0)) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: see above.
            unsafe { Self(_mm512_add_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            // SAFETY: see above.
            unsafe { Self(_mm512_mul_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            // SAFETY: see above.
            unsafe { Self(_mm512_max_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn exp2_whole(self) -> Self {
            // SAFETY: see above.
            unsafe {
                let biased = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased)))
            }
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            // SAFETY: see above.
            unsafe { Self(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)) }
        }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256, __m256);

    macro_rules! halves {
        ($f:ident, $a:expr) => {
            Self($f($a.0), $f($a.1))
        };
        ($f:ident, $a:expr, $b:expr) => {
            Self($f($a.0, $b.0), $f($a.1, $b.1))
        };
        ($f:ident, $a:expr, $b:expr, $c:expr) => {
            Self($f($a.0, $b.0, $c.0), $f($a.1, $b.1, $c.1))
        };
    }

    #[inline(always)]
    unsafe fn widen_bf16(half: __m128i) -> __m256 {
        // SAFETY: AVX2, for which the caller vouches.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half))) }
    }

    #[inline(always)]
    unsafe fn exp2_half(n: __m256) -> __m256 {
        // SAFETY: AVX2, for which the caller vouches.
        unsafe {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        }
    }

    // SAFETY of all methods: as for Avx512.
    impl Lanes for Avx2 {
        const TILE_ROWS: usize = 3;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: see above.
            unsafe { Self(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: see above.
            unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            // SAFETY: see above.
            unsafe {
                let upper = from.add(8);
                Self(widen_bf16(_mm_loadu_si128(from.cast())), widen_bf16(_mm_loadu_si128(upper.cast())))
            }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self {
            // SAFETY: see above.
            unsafe {
                let upper = from.add(8);
                Self(
                    _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                    _mm256_cvtph_ps(_mm_loadu_si128(upper.cast())),
                )
            }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: see above.
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }
        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            // SAFETY: see above.
            unsafe { halves!(_mm256_fmadd_ps, a, b, self) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: see above.
            unsafe { halves!(_mm256_add_ps, self, other) }
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            // SAFETY: see above.
            unsafe { halves!(_mm256_mul_ps, self, other) }
        }
        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            // SAFETY: see above.
            unsafe { halves!(_mm256_max_ps, self, other) }
        }
        #[inline(always)]
        unsafe fn exp2_whole(self) -> Self {
            // SAFETY: see above.
            unsafe { halves!(exp2_half, self) }
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            const MODE: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            // SAFETY: see above.
            unsafe { Self(_mm256_round_ps::<MODE>(self.0), _mm256_round_ps::<MODE>(self.1)) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

/// Compiles a generic kernel for each instruction set and calls the given one.
///
/// `dispatch!(isa, kernel(arguments: Types))` expects `unsafe fn kernel<L: Lanes>(arguments: Types)`.
macro_rules! dispatch {
    ($isa:expr, $kernel:ident($($name:ident: $type:ty),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
            unsafe fn avx512($($name: $type),*) {
                // SAFETY: passed on from the caller, with the instructions that this function enables.
                unsafe { $kernel::<$crate::lanes::Avx512>($($name),*) }
            }
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2($($name: $type),*) {
                // SAFETY: passed on from the caller, with the instructions that this function enables.
                unsafe { $kernel::<$crate::lanes::Avx2>($($name),*) }
            }
            match $isa {
                $crate::lanes::Isa::Avx512 => avx512($($name),*),
                $crate::lanes::Isa::Avx2 => avx2($($name),*),
                $crate::lanes::Isa::Portable => $kernel::<$crate::lanes::Plain>($($name),*),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = $isa;
            $kernel::<$crate::lanes::Plain>($($name),*)
        }
    }};
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests {
    use super::*;

    unsafe fn exp_of<L: Lanes>(x: *const f32, y: *mut f32) {
        // SAFETY: the test passes sixteen elements.
        unsafe { exp(L::load(x)).store(y) }
    }

    #[test]
    fn exp_is_accurate_and_the_same_everywhere() {
        for i in -870..=300 {
            let x: [f32; LANES] = std::array::from_fn(|lane| i as f32 * 0.1 + lane as f32 * 0.006);
            let run = |isa: Isa| {
                let mut y = [0f32; LANES];
                let (from, to) = (x.as_ptr(), y.as_mut_ptr());
                // SAFETY: sixteen elements each, and only instruction sets that were found are asked for.
                unsafe { dispatch!(isa, exp_of(from: *const f32, to: *mut f32)) };
                y
            };
            let plain = run(Isa::Portable);
            for (x, y) in x.iter().zip(plain) {
                let exact = f64::from(*x).exp();
                let error = (f64::from(y) - exact).abs() / exact;
                assert!(error < 3e-7 || *x < -87.0, "exp({x}) = {y}, off by {error:e}");
            }
            assert_eq!(plain.map(f32::to_bits), run(Isa::detect()).map(f32::to_bits));
            if Isa::detect() == Isa::Avx512 {
                assert_eq!(plain.map(f32::to_bits), run(Isa::Avx2).map(f32::to_bits));
            }
        }
    }
}
