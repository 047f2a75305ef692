//! Compiles `asm/switch.S`: the first frame of every coroutine and the one thread-local variable.

fn main() {
    println!("cargo::rerun-if-changed=asm");
    // Where asm/frame_map.inc lies, for the build scripts of crates that use it: DEP_REGROW_INCLUDE.
    println!("cargo::metadata=include={}/asm", std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default());
    let of = |key: &str| std::env::var(key).unwrap_or_default();
    if of("CARGO_CFG_TARGET_ARCH") != "x86_64" || of("CARGO_CFG_TARGET_OS") != "linux" {
        return; // src/lib.rs says so with a `compile_error!`, which reads better than a failing assembler.
    }
    cc::Build::new().file("asm/switch.S").flag("-Wa,-Iasm").compile("regrow_switch");
}
