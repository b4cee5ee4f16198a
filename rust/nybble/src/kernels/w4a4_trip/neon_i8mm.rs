//! `w4a4_trip/neon_i8mm`: the multiplier compiled for this tier.

use crate::cpu::Isa;

tier!(NeonI8mm, Isa::NeonI8mm, "neon,dotprod,i8mm");
