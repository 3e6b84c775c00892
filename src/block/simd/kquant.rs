//! The K types: the portable search, compiled for wider registers.

use super::super::{Codec, q2_k, q3_k, q4_k, q5_k, q6_k};

/// A table of codecs: the portable functions compiled with the given features.
macro_rules! table {
    ($table:ident, $name:literal, $features:literal) => {
        pub(super) static $table: &[Codec] = {
            macro_rules! row {
                ($module:ident) => {
                    Codec {
                        implementation: $name,
                        encode: Some(|src, dst| {
                            #[target_feature(enable = $features)]
                            unsafe fn run(src: &[f32], dst: &mut [u8]) {
                                $module::encode(src, None, dst);
                            }
                            // SAFETY: the table is handed out only after the features were detected.
                            unsafe { run(src, dst) }
                        }),
                        weigh: Some(|src, importance, dst| {
                            #[target_feature(enable = $features)]
                            unsafe fn run(src: &[f32], importance: &[f32], dst: &mut [u8]) {
                                $module::encode(src, Some(importance), dst);
                            }
                            // SAFETY: the table is handed out only after the features were detected.
                            unsafe { run(src, importance, dst) }
                        }),
                        ..$module::SCALAR
                    }
                };
            }
            &[row!(q2_k), row!(q3_k), row!(q4_k), row!(q5_k), row!(q6_k)]
        };
    };
}

table!(AVX2, "avx2", "avx2,f16c");
table!(AVX512, "avx512", "avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c");
