//! `w4a4_trip/neon`: the multiplier compiled for this tier.

use crate::cpu::Isa;

tier!(Neon, Isa::Neon, "neon");
