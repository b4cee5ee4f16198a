//! Activation functions in portable Rust: the oracle of the other tiers.

use super::{Elementwise, loops};
use crate::cpu::Isa;
use crate::kernels::f32::scalar::Scalar;

tier!(Scalar, Isa::Scalar);
