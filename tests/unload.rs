//! The crate in a library that is loaded at run time: once it has installed the fault handler it stays when it is closed, and
//! the handler does not ask the loader for thread-local variables. Each in a child process, with a library of its own
//! copy of the crate (`tests/unload/plugin.rs`).
#![cfg(target_env = "gnu")]

use std::cell::Cell;
use std::ffi::{CString, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

mod support;
use support::{this_test, variant};

/// The library's package: one of its own, so that the crate in it has the features and the copy of data that it has there.
fn package() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("plugin")
}

/// Where the library is, which the test proper compiles for its children.
fn path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if variant().is_none() {
            compile();
        }
        package().join("target/debug/libplugin.so")
    })
}

fn compile() {
    let (root, package) = (Path::new(env!("CARGO_MANIFEST_DIR")), package());
    std::fs::create_dir_all(&package).unwrap();
    std::fs::copy(root.join("Cargo.lock"), package.join("Cargo.lock")).unwrap();
    let source = root.join("tests/unload/plugin.rs");
    let manifest = format!(
        "[package]\nname = \"plugin\"\nedition = \"2024\"\n[dependencies]\nregrow.path = {root:?}\n\
         [lib]\ncrate-type = [\"cdylib\"]\npath = {source:?}\n[workspace]\n"
    );
    std::fs::write(package.join("Cargo.toml"), manifest).unwrap();
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--offline", "--target-dir"]).arg(package.join("target"));
    assert!(cargo.current_dir(&package).status().unwrap().success());
}

thread_local!(static ARMED: Cell<bool> = const { Cell::new(false) });

/// Ends the process from here on if the library asks where a thread-local variable is.
extern "C" fn arm(armed: bool) {
    ARMED.set(armed);
}

/// What libraries ask, in front of the loader's: it may lock and allocate.
#[unsafe(no_mangle)]
unsafe extern "C" fn __tls_get_addr(variable: *mut c_void) -> *mut c_void {
    static LOADERS: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
    if ARMED.get() {
        // SAFETY: ends the process.
        unsafe { libc::_exit(99) }
    }
    if LOADERS.load(Ordering::Relaxed).is_null() {
        // SAFETY: a constant name.
        LOADERS.store(unsafe { libc::dlsym(libc::RTLD_NEXT, c"__tls_get_addr".as_ptr()) }, Ordering::Relaxed);
    }
    // SAFETY: the loader's function, which has this signature.
    unsafe {
        let loaders = LOADERS.load(Ordering::Relaxed);
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void) -> *mut c_void>(loaders)(
            variable,
        )
    }
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
            std::mem::transmute::<*mut c_void, extern "C" fn(u64, extern "C" fn(bool)) -> u64>(deep)(400, arm)
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
    let ways =
        ["by the thread that used it", "by another thread", "in a key's destructor", "and loaded again"];
    let Some(way) = variant() else {
        path();
        for way in ways {
            let outcome = this_test!().child(way);
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

#[test]
fn the_handler_of_a_library_asks_the_loader_for_no_thread_local() {
    if variant().is_none() {
        path();
        return this_test!().passes();
    }
    let plugin = Plugin::load();
    plugin.grows();
    // SAFETY: the function has this signature; the address is that of a local variable of a coroutine that is never dropped.
    let frozen = unsafe {
        let frozen = libc::dlsym(plugin.0, c"plugin_frozen".as_ptr());
        std::mem::transmute::<*mut c_void, extern "C" fn() -> usize>(frozen)()
    };
    // A thread that the library knows nothing of.
    std::thread::spawn(move || {
        arm(true);
        // SAFETY: as above.
        assert_eq!(unsafe { (frozen as *const u64).read_volatile() }, 5);
        arm(false);
    })
    .join()
    .unwrap();
}
