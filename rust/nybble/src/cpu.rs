//! What this CPU can do, and the only place that asks it.
//!
//! A *capability token* such as [`Avx2`] can be made only when the CPU has the instructions and `NYBBLE_ISA` allows them,
//! so holding one is the proof that calling a `#[target_feature]` function of that tier is legal. Everything above the
//! kernels is therefore safe code.
//!
//! `NYBBLE_ISA=scalar|avx2|avxvnni|avx512vnni|neon|neon_dotprod|neon_i8mm` lowers the tier; it can never raise it.

use std::sync::OnceLock;

use crate::error::{Error, Result};

/// An instruction set tier; later ones of one architecture include the earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable Rust, the oracle of every kernel.
    Scalar,
    /// x86-64 AVX2, FMA and F16C.
    Avx2,
    /// AVX2 with the VEX-encoded dot product (`vpdpbusd ymm`).
    AvxVnni,
    /// AVX-512 F, BW, VL and VNNI.
    Avx512Vnni,
    /// ARMv8.0 NEON, no dot product.
    Neon,
    /// NEON with `sdot`.
    NeonDotprod,
    /// NEON with `smmla`.
    NeonI8mm,
}

impl Isa {
    /// Every tier, lowest first.
    pub const ALL: [Self; 7] = [
        Self::Scalar,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512Vnni,
        Self::Neon,
        Self::NeonDotprod,
        Self::NeonI8mm,
    ];

    /// The name used in `NYBBLE_ISA`, in kernel names and by `nybble doctor`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512Vnni => "avx512vnni",
            Self::Neon => "neon",
            Self::NeonDotprod => "neon_dotprod",
            Self::NeonI8mm => "neon_i8mm",
        }
    }

    /// The tier of that name.
    pub fn parse(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|isa| isa.name() == name).ok_or_else(|| {
            Error::argument("NYBBLE_ISA", Self::ALL.map(Self::name).join(", "), format!("{name:?}"))
        })
    }

    /// Whether the CPU has this tier's instructions, whatever `NYBBLE_ISA` says.
    pub fn detected(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Self::Avx2.detected() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => {
                Self::Avx2.detected()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDotprod => Self::Neon.detected() && std::arch::is_aarch64_feature_detected!("dotprod"),
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm => Self::NeonDotprod.detected() && std::arch::is_aarch64_feature_detected!("i8mm"),
            _ => false,
        }
    }

    /// Whether kernels of this tier may run: detected, and not above `NYBBLE_ISA`.
    ///
    /// An unreadable `NYBBLE_ISA` allows nothing but `scalar` here; [`check_environment`] reports it as an error.
    pub fn allowed(self) -> bool {
        self <= cap() && self.detected()
    }

    /// The highest allowed tier.
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.allowed()).unwrap_or(Self::Scalar)
    }
}

fn requested() -> &'static Result<Option<Isa>> {
    static REQUESTED: OnceLock<Result<Option<Isa>>> = OnceLock::new();
    REQUESTED.get_or_init(|| match std::env::var_os("NYBBLE_ISA") {
        None => Ok(None),
        Some(value) => Isa::parse(&value.to_string_lossy()).map(Some),
    })
}

fn cap() -> Isa {
    match requested() {
        Ok(None) => Isa::NeonI8mm,
        Ok(Some(isa)) => *isa,
        Err(_) => Isa::Scalar,
    }
}

/// Reports a `NYBBLE_ISA` that names no tier.
pub fn check_environment() -> Result<()> {
    match requested() {
        Ok(_) => Ok(()),
        Err(error) => {
            let found = std::env::var("NYBBLE_ISA").unwrap_or_default();
            Err(match error {
                Error::Argument { name, expected, .. } => Error::argument(name, expected.as_str(), found),
                other => Error::argument("NYBBLE_ISA", "the name of a tier", other),
            })
        }
    }
}

macro_rules! token {
    ($(#[$doc:meta])* $name:ident, $isa:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        pub struct $name(());

        impl $name {
            /// The token, if the CPU has the tier and `NYBBLE_ISA` allows it.
            pub fn new() -> Option<Self> {
                $isa.allowed().then_some(Self(()))
            }
        }
    };
}

token!(/** Proof that AVX2, FMA and F16C may be used. */ Avx2, Isa::Avx2);
token!(/** Proof that AVX2 with VEX VNNI may be used. */ AvxVnni, Isa::AvxVnni);
token!(/** Proof that AVX-512 F, BW, VL and VNNI may be used. */ Avx512Vnni, Isa::Avx512Vnni);
token!(/** Proof that NEON may be used. */ Neon, Isa::Neon);
token!(/** Proof that NEON with `sdot` may be used. */ NeonDotprod, Isa::NeonDotprod);
token!(/** Proof that NEON with `smmla` may be used. */ NeonI8mm, Isa::NeonI8mm);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_unknown_ones_are_refused() {
        for isa in Isa::ALL {
            assert_eq!(Isa::parse(isa.name()).ok(), Some(isa));
        }
        let message = Isa::parse("avx9").map_err(|e| e.to_string());
        assert!(message.is_err_and(|m| m.contains("avx512vnni") && m.contains("avx9")));
    }

    #[test]
    fn scalar_is_always_there() {
        assert!(Isa::Scalar.detected() && Isa::Scalar.allowed());
        assert!(Isa::best().detected());
    }
}
