//! The loops of attention compiled for AVX-512; its products are the panels of that tier.

use super::softmax::{Scores, Update};
use super::{block::SoftmaxTier, softmax};
use crate::cpu::Avx512Vnni;

tier!(Avx512Vnni, "avx512f,avx512bw,avx512vl,avx2,fma,f16c");
