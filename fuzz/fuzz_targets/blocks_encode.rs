#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    qconv_fuzz::run("blocks_encode", data);
});
