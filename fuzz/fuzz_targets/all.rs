//! All targets in one program: `QCONV_FUZZ_TARGET` names the one, `--list` lists all, and
//! `--list TARGET` where that has other seeds.
#![no_main]

use std::alloc::System;
use std::sync::OnceLock;

use cap::Cap;
use qconv_fuzz::TARGETS;

/// What wants more memory ends here, and is a finding.
#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, 256 << 20);

static NAME: OnceLock<String> = OnceLock::new();

libfuzzer_sys::fuzz_target!(
    init: {
        let mut args = std::env::args().skip(1);
        if args.next().as_deref() == Some("--list") {
            match args.next() {
                None => TARGETS.iter().for_each(|t| println!("{}", t.name)),
                Some(name) => TARGETS.iter().filter(|t| t.name == name).for_each(|t| println!("{}", t.beside)),
            }
            std::process::exit(0);
        }
        let name = std::env::var("QCONV_FUZZ_TARGET").unwrap_or_default();
        assert!(TARGETS.iter().any(|t| t.name == name), "QCONV_FUZZ_TARGET is {name:?}; --list lists what it can be");
        NAME.get_or_init(|| name);
    },
    |data: &[u8]| {
        qconv_fuzz::run(NAME.get().map_or("", String::as_str), data);
    }
);
