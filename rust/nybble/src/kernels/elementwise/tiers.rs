//! How plain loops become the kernels of a tier.
//!
//! For code that the compiler vectorises by itself, a tier differs only in the instructions the compiler may use. An
//! operation therefore keeps its arithmetic in one module `loops` of `#[inline(always)]` functions, and each tier's file
//! instantiates them under its features. The trait is implemented on the capability token, so holding a kernel is the proof
//! that it may run.

/// Implements a kernel trait for a token by the functions of the module `loops` that is in scope.
macro_rules! instantiate {
    ($trait:ident for $token:ty, $isa:expr; $(fn $name:ident($($arg:ident: $ty:ty),* $(,)?);)+) => {
        impl $trait for $token {
            fn isa(&self) -> $crate::cpu::Isa {
                $isa
            }
            $(
                fn $name(&self, $($arg: $ty),*) {
                    loops::$name($($arg),*)
                }
            )+
        }
    };
    ($trait:ident for $token:ty, $isa:expr, $features:literal; $(fn $name:ident($($arg:ident: $ty:ty),* $(,)?);)+) => {
        impl $trait for $token {
            fn isa(&self) -> $crate::cpu::Isa {
                $isa
            }
            $(
                fn $name(&self, $($arg: $ty),*) {
                    #[target_feature(enable = $features)]
                    fn go($($arg: $ty),*) {
                        loops::$name($($arg),*)
                    }
                    // SAFETY: `self` is the proof that the instructions are there.
                    unsafe { go($($arg),*) }
                }
            )+
        }
    };
}
pub(crate) use instantiate;

/// The list of an operation's kernels: `scalar` and every tier whose token can be had, lowest first. `neon` adds that tier;
/// plain loops need none, for every 64-bit ARM has NEON and the portable code is compiled for it.
macro_rules! listed {
    ($kernel:ty $(, $neon:ident)?) => {{
        #[allow(unused_mut)]
        let mut list: Vec<&'static $kernel> = vec![&$crate::kernels::f32::scalar::Scalar];
        // Leaking a token allocates nothing: it has no size.
        #[cfg(target_arch = "x86_64")]
        {
            use $crate::cpu::{Avx2, Avx512Vnni};
            list.extend(Avx2::new().map(|token| &*Box::leak(Box::new(token)) as &'static $kernel));
            list.extend(Avx512Vnni::new().map(|token| &*Box::leak(Box::new(token)) as &'static $kernel));
        }
        $(
            #[cfg(target_arch = "aarch64")]
            {
                let $neon = $crate::cpu::Neon::new();
                list.extend($neon.map(|token| &*Box::leak(Box::new(token)) as &'static $kernel));
            }
        )?
        list
    }};
}
pub(crate) use listed;
