//! Rotations compiled for AVX2.

use super::{Rope, loops};
use crate::cpu::{Avx2, Isa};

tier!(Avx2, Isa::Avx2, "avx2,fma,f16c");
