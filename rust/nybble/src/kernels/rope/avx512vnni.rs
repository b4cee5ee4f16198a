//! Rotations compiled for AVX-512.

use super::{Rope, loops};
use crate::cpu::{Avx512Vnni, Isa};

tier!(Avx512Vnni, Isa::Avx512Vnni, "avx512f,avx512bw,avx512vl,avx2,fma,f16c");
