//! `w4a4_trip/neon_dotprod`: the multiplier compiled for this tier.

use crate::cpu::Isa;

tier!(NeonDotprod, Isa::NeonDotprod, "neon,dotprod");
