//! The loops of attention compiled for AVX2; its products are the panels of that tier.

use super::softmax::{Scores, Update};
use super::{block::SoftmaxTier, softmax};
use crate::cpu::Avx2;

tier!(Avx2, "avx2,fma,f16c");
