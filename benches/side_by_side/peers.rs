//! Peers that are programs of their own: benches/peers. Compiled here, run beside us, asked for their rounds in turn.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::measure::Run;

/// The programs there are, by what the table calls them.
pub const PROGRAMS: [(&str, &str); 2] = [("Boost.Context", "boost"), ("Go", "go")];

fn path(program: &str) -> PathBuf {
    target().join("peers").join(program)
}

/// The target directory.
pub fn target() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("a folder of the target directory").to_path_buf()
}

/// Compiles them; says which are skipped. Returns the versions of those that are there.
pub fn compile() -> Vec<String> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers");
    std::fs::create_dir_all(target().join("peers")).expect("a directory in the target directory");
    let mut boost = Command::new("g++");
    boost.args(["-O2", "-o"]).arg(path("boost")).arg(sources.join("boost.cpp")).arg("-lboost_context");
    let mut go = Command::new("go");
    go.args(["build", "-o"]).arg(path("go")).arg(sources.join("go/main.go"));
    let mut versions = Vec::new();
    for ((name, program), (mut compiler, version)) in
        PROGRAMS.into_iter().zip([(boost, ["g++", "--version"]), (go, ["go", "version"])])
    {
        let _ = std::fs::remove_file(path(program));
        let done = compiler.stderr(Stdio::null()).status().is_ok_and(|status| status.success());
        match first_line(&version) {
            Some(version) if done => versions.push(format!("{name} by {version}")),
            _ => eprintln!("{name}: skipped, {} cannot compile {}", version[0], sources.display()),
        }
    }
    versions
}

/// The first line that a command prints.
pub fn first_line(command: &[&str]) -> Option<String> {
    let output = Command::new(command[0]).args(&command[1..]).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.to_owned())
}

/// A shape of a peer's, if it is there.
pub fn run(program: &str, shape: &'static str, argument: u64) -> Option<Run<'static>> {
    let mut child = Command::new(path(program)).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
    let mut requests = child.stdin.take()?; // when it is dropped the program ends
    let mut answers = BufReader::new(child.stdout.take()?);
    Some(Box::new(move |count| {
        let mut line = String::new();
        writeln!(requests, "{shape} {argument} {count}").expect("the peer reads");
        answers.read_line(&mut line).expect("the peer answers");
        Duration::from_nanos(line.trim().parse().expect("a number of nanoseconds"))
    }))
}
