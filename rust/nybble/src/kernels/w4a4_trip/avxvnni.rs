//! `w4a4_trip/avxvnni`: the multiplier compiled for this tier.

use crate::cpu::Isa;

tier!(AvxVnni, Isa::AvxVnni, "avxvnni,avx2,fma,f16c");
