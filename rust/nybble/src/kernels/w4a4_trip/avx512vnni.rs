//! `w4a4_trip/avx512vnni`: the multiplier compiled for this tier.

use crate::cpu::Isa;

tier!(Avx512Vnni, Isa::Avx512Vnni, "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c");
