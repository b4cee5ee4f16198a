//! Activation functions compiled for AVX2.

use super::{Elementwise, loops};
use crate::cpu::{Avx2, Isa};

tier!(Avx2, Isa::Avx2, "avx2,fma,f16c");
