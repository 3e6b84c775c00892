#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    qconv_fuzz::run("gguf_round_trip", data);
});
