//! A library that has installed the fault handler stays when it is closed. Each in a child process, with a library of its own
//! copy of the crate (`tests/unload/plugin.rs`).
#![cfg(target_env = "gnu")]

use std::ffi::{CString, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

mod support;
use support::{child, variant};

/// Where the library is, which the test proper compiles for its children.
fn path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let to = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libplugin.so");
        if variant().is_none() {
            compile(&to);
        }
        to
    })
}

fn compile(to: &Path) {
    let dependencies = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let file = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str()?;
        (name.starts_with("libregrow-") && name.ends_with(".rlib")).then_some(path)
    };
    let crates = dependencies.read_dir().unwrap().filter_map(file);
    let latest = crates.max_by_key(|path| path.metadata().unwrap().modified().unwrap()).unwrap();
    let mut external = std::ffi::OsString::from("regrow=");
    external.push(latest);
    let mut search = std::ffi::OsString::from("dependency=");
    search.push(dependencies);
    let status = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()))
        .args([
            "--edition=2024",
            "--crate-type=cdylib",
            "-Cdebuginfo=0",
            "tests/unload/plugin.rs",
            "--extern",
        ])
        .arg(external)
        .arg("-L")
        .arg(search)
        .arg("-o")
        .arg(to)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status();
    assert!(status.unwrap().success());
}

/// The library, loaded.
struct Plugin(*mut c_void);

// SAFETY: a handle of the dynamic linker, for any thread.
unsafe impl Send for Plugin {}

impl Plugin {
    fn load() -> Self {
        let path = CString::new(path().as_os_str().as_bytes()).unwrap();
        // SAFETY: the library's initialisers may be run here.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
        assert!(!handle.is_null());
        Self(handle)
    }

    fn grows(&self) {
        // SAFETY: the function has this signature.
        let sum = unsafe {
            let deep = libc::dlsym(self.0, c"plugin_deep".as_ptr());
            std::mem::transmute::<*mut c_void, extern "C" fn(u64) -> u64>(deep)(400)
        };
        assert_eq!(sum, 400 * 401 / 2);
    }

    fn close(self) {
        // SAFETY: loaded above, and nothing of it is used from here on, as far as this program knows.
        assert_eq!(unsafe { libc::dlclose(self.0) }, 0);
    }
}

extern "C" fn hosts_own(_signal: c_int) {
    // SAFETY: ends the process.
    unsafe { libc::_exit(42) }
}

static OPEN: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

extern "C" fn closes(_value: *mut c_void) {
    Plugin(OPEN.swap(ptr::null_mut(), Ordering::Relaxed)).close();
}

/// Has this thread close the library among the last things it does: the key is older than any of the library's.
fn close_at_the_end_of_a_thread() {
    let mut key = 0;
    // SAFETY: plain calls, with a destructor of the right signature.
    unsafe { assert_eq!(libc::pthread_key_create(&mut key, Some(closes)), 0) };
    std::thread::spawn(move || {
        let plugin = Plugin::load();
        plugin.grows();
        OPEN.store(plugin.0, Ordering::Relaxed);
        // SAFETY: the key was made above.
        unsafe { libc::pthread_setspecific(key, 8 as *const c_void) };
    })
    .join()
    .unwrap();
}

#[test]
fn a_library_that_has_installed_the_handler_stays_when_it_is_closed() {
    const TEST: &str = "a_library_that_has_installed_the_handler_stays_when_it_is_closed";
    let ways =
        ["by the thread that used it", "by another thread", "in a key's destructor", "and loaded again"];
    let Some(way) = variant() else {
        path();
        for way in ways {
            let outcome = child(TEST, way);
            assert_eq!(outcome.status.code(), Some(42), "{way}: {outcome}");
        }
        return;
    };
    // SAFETY: a handler that ends the process.
    unsafe { libc::signal(libc::SIGSEGV, hosts_own as *const () as usize) };
    let used = || {
        let plugin = Plugin::load();
        plugin.grows();
        plugin
    };
    if way == ways[0] {
        std::thread::spawn(move || used().close()).join().unwrap();
    } else if way == ways[1] {
        std::thread::spawn(used).join().unwrap().close();
    } else if way == ways[2] {
        close_at_the_end_of_a_thread();
    } else {
        for _ in 0..3 {
            std::thread::spawn(move || used().close()).join().unwrap();
        }
    }
    // SAFETY: none: it is made to fault.
    unsafe { std::ptr::without_provenance::<u8>(std::hint::black_box(16)).read_volatile() };
}
