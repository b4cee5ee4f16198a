//! `w4a4_trip/avx2`: the multiplier compiled for this tier.

use crate::cpu::Isa;

tier!(Avx2, Isa::Avx2, "avx2,fma,f16c");
