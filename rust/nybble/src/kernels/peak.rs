//! The most 8-bit products a second that each tier's multiply instruction allows: the yardstick of prefill.
//!
//! Nothing but independent chains of that one instruction, all operands in registers. A matmul also has to load, unpack and
//! scale, so it stays below.

use std::hint::black_box;
use std::time::Instant;

use crate::cpu::{self, Isa};
use crate::threads::Pool;

/// Independent chains: more than any of these instructions' latency times its rate.
const CHAINS: usize = 12;

/// Instructions of a chain in one measurement, about a millisecond.
const ROUNDS: usize = 200_000;

/// Measurements; the best one counts, for neighbours on the machine can only slow one down.
const PASSES: usize = 7;

/// One thread's share: `CHAINS * ROUNDS` of the tier's instruction.
type Loop = fn();

/// Products a second of all the pool's threads together, with the instruction that the integer kernels of `isa` use; none
/// for `scalar`, whose instructions the compiler chooses, and for tiers this CPU lacks.
pub fn int8_products(pool: &Pool, isa: Isa) -> Option<f64> {
    let (work, products) = instruction(isa)?;
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        let start = Instant::now();
        pool.run(&|_| work());
        best = best.min(start.elapsed().as_secs_f64());
    }
    Some((products * CHAINS * ROUNDS * pool.threads()) as f64 / best)
}

/// Cycles a second while this runs, from a chain of additions of which each waits for the one before.
///
/// The system's own figure is the nominal one; what a core does depends on its neighbours and on how warm it is.
pub fn clock() -> f64 {
    const STEPS: u64 = 4_000_000;
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        let start = Instant::now();
        let mut x = black_box(1_u64);
        for i in 0..STEPS {
            x = (x ^ i).rotate_left(7); // two instructions of a cycle each
        }
        black_box(x);
        best = best.min(start.elapsed().as_secs_f64());
    }
    (2 * STEPS) as f64 / best
}

/// The loop of a tier and the products of one instruction.
fn instruction(isa: Isa) -> Option<(Loop, usize)> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: (all four) the token proves that the CPU has the instructions.
        Isa::Avx2 => cpu::Avx2::new().map(|_| (|| unsafe { x86::maddubs() }) as Loop).zip(Some(32)),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::AvxVnni => cpu::AvxVnni::new().map(|_| (|| unsafe { x86::dpbusd_vex() }) as Loop).zip(Some(32)),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => {
            // SAFETY: as above.
            cpu::Avx512Vnni::new().map(|_| (|| unsafe { x86::dpbusd() }) as Loop).zip(Some(64))
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: (all three) the token proves that the CPU has the instructions.
        Isa::Neon => cpu::Neon::new().map(|_| (|| unsafe { arm::smlal() }) as Loop).zip(Some(8)),
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        Isa::NeonDotprod => {
            cpu::NeonDotprod::new().map(|_| (|| unsafe { arm::sdot() }) as Loop).zip(Some(16))
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        Isa::NeonI8mm => cpu::NeonI8mm::new().map(|_| (|| unsafe { arm::smmla() }) as Loop).zip(Some(32)),
        _ => None,
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{CHAINS, ROUNDS, black_box};

    #[target_feature(enable = "avx2")]
    pub(super) fn maddubs() {
        let x = black_box(_mm256_set1_epi8(1));
        let mut chains = [black_box(_mm256_set1_epi8(1)); CHAINS];
        for _ in 0..ROUNDS {
            for chain in &mut chains {
                *chain = _mm256_maddubs_epi16(*chain, x);
            }
        }
        black_box(chains);
    }

    #[target_feature(enable = "avxvnni,avx2")]
    pub(super) fn dpbusd_vex() {
        let x = black_box(_mm256_set1_epi8(1));
        let mut chains = [black_box(_mm256_setzero_si256()); CHAINS];
        for _ in 0..ROUNDS {
            for chain in &mut chains {
                *chain = _mm256_dpbusd_avx_epi32(*chain, x, x);
            }
        }
        black_box(chains);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) fn dpbusd() {
        let x = black_box(_mm512_set1_epi8(1));
        let mut chains = [black_box(_mm512_setzero_si512()); CHAINS];
        for _ in 0..ROUNDS {
            for chain in &mut chains {
                *chain = _mm512_dpbusd_epi32(*chain, x, x);
            }
        }
        black_box(chains);
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;

    use super::{CHAINS, ROUNDS, black_box};
    use crate::kernels::arm;

    #[target_feature(enable = "neon")]
    pub(super) fn smlal() {
        let x = black_box(vdup_n_s8(1));
        let mut chains = [black_box(vdupq_n_s16(0)); CHAINS];
        for _ in 0..ROUNDS {
            for chain in &mut chains {
                *chain = vmlal_s8(*chain, x, x);
            }
        }
        black_box(chains);
    }

    #[target_feature(enable = "neon,dotprod")]
    pub(super) fn sdot() {
        let x = black_box(vdupq_n_s8(1));
        let mut chains = [black_box(vdupq_n_s32(0)); CHAINS];
        for _ in 0..ROUNDS {
            for chain in &mut chains {
                *chain = arm::sdot_lane::<0>(*chain, x, x);
            }
        }
        black_box(chains);
    }

    #[target_feature(enable = "neon,i8mm")]
    pub(super) fn smmla() {
        let x = black_box(vdupq_n_s8(1));
        let mut chains = [black_box(vdupq_n_s32(0)); CHAINS];
        for _ in 0..ROUNDS {
            for chain in &mut chains {
                *chain = arm::smmla(*chain, x, x);
            }
        }
        black_box(chains);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_allowed_tier_but_scalar_has_a_peak() {
        let pool = Pool::new(2).expect("a pool");
        for isa in Isa::ALL {
            let found = int8_products(&pool, isa);
            assert_eq!(found.is_some(), isa.allowed() && isa != Isa::Scalar, "{}", isa.name());
            assert!(found.is_none_or(|rate| rate.is_finite() && rate > 0.0));
        }
    }
}
