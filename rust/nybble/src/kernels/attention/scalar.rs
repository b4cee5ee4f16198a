//! The loops of attention in portable Rust: the oracle of the other tiers.

use super::softmax::{Scores, Update};
use super::{block::SoftmaxTier, softmax};
use crate::kernels::f32::scalar::Scalar;

tier!(Scalar);
