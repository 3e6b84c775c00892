#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    qconv_fuzz::run("qpack_planes", data);
});
