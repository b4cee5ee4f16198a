//! Norms in portable Rust: the oracle of the other tiers.

use super::{Norm, loops};
use crate::cpu::Isa;
use crate::kernels::f32::scalar::Scalar;

tier!(Scalar, Isa::Scalar);
