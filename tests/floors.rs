//! The sources keep to the floors of docs/architecture.md: a file imports only from lower ones.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// For each folder, by its name, the height of each of its files and folders. The sources' own folder is "".
type Floors = BTreeMap<String, BTreeMap<String, usize>>;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The lists of the document: blocks that begin with "```floors" and the folder's name.
fn floors(document: &str) -> Floors {
    let mut all = Floors::new();
    for block in document.split("```floors").skip(1) {
        let (folder, rows) = block.split_once('\n').expect("a block has lines");
        let (rows, _) = rows.split_once("```").expect("a block ends");
        let floors = all.entry(folder.trim().to_owned()).or_default();
        for (height, row) in rows.lines().rev().enumerate() {
            floors.extend(row.split_whitespace().map(|name| (name.to_owned(), height)));
        }
    }
    all
}

/// The source files below `src`, by their module path: `grow/relocate`; that of a folder's `mod.rs` is the folder.
fn sources() -> BTreeMap<String, String> {
    fn visit(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { visit(&path, files) } else { files.push(path) }
        }
    }
    let src = root().join("src");
    let mut files = Vec::new();
    visit(&src, &mut files);
    let name = |path: &Path| {
        let name = path.strip_prefix(&src).unwrap().with_extension("");
        let name = name.to_str().unwrap().to_owned();
        name.strip_suffix("/mod").map_or(name.clone(), str::to_owned)
    };
    files.iter().map(|path| (name(path), fs::read_to_string(path).unwrap())).collect()
}

/// The code of a file without comments and unit tests, which may use anything.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The module paths that the code of the file `name` uses, as `[first, second, ...]` from the root.
fn uses(name: &str, is_folder: bool, text: &str) -> Vec<Vec<String>> {
    let code = code(text).replace("pub(super)", "").replace("pub(crate)", "");
    let parent: Vec<String> = name.split('/').map(str::to_owned).collect();
    let parent = &parent[..parent.len() - usize::from(!is_folder || parent.len() == 1)];
    let mut all = Vec::new();
    for (base, prefix) in [("crate::", &[][..]), ("super::", parent)] {
        for (at, _) in code.match_indices(base) {
            let path = &code[at + base.len()..];
            let end = path.find(|c: char| !(c.is_alphanumeric() || "_:".contains(c))).unwrap_or(path.len());
            let (path, rest) = path.split_at(end);
            let start: Vec<String> = prefix
                .iter()
                .cloned()
                .chain(path.split("::").map(str::to_owned))
                .filter(|part| !part.is_empty())
                .collect();
            let group = rest.strip_prefix('{').filter(|_| path.is_empty() || path.ends_with("::"));
            let Some(group) = group else {
                all.push(start);
                continue;
            };
            let mut depth = 1;
            let mut items = vec![String::new()];
            for c in group.chars() {
                depth += i32::from(c == '{') - i32::from(c == '}');
                match (depth, c) {
                    (0, _) => break,
                    (1, ',') => items.push(String::new()),
                    (1, _) => items.last_mut().expect("there is always one").push(c),
                    _ => {}
                }
            }
            for item in items {
                let first = item.trim().split("::").next().unwrap_or_default().to_owned();
                all.push(start.iter().cloned().chain([first]).filter(|part| !part.is_empty()).collect());
            }
        }
    }
    all
}

/// What is wrong, a sentence for each import.
fn arrows_upwards(floors: &Floors, sources: &BTreeMap<String, String>) -> BTreeSet<String> {
    let folders: BTreeSet<&str> = sources.keys().filter_map(|name| Some(name.split_once('/')?.0)).collect();
    let mut wrong = BTreeSet::new();
    for (name, text) in sources.iter().filter(|(name, _)| *name != "lib") {
        let (top, below) =
            name.split_once('/').map_or((name.as_str(), None), |(top, below)| (top, Some(below)));
        let is_folder = folders.contains(name.as_str());
        for path in uses(name, is_folder, text) {
            let Some(target) = path.first().map(String::as_str) else { continue };
            if target == top {
                // Within a folder, by its own list. The folder's `mod.rs` stands on top.
                let Some(from) = below else { continue };
                let own = &floors[top];
                match (own.get(from), path.get(1).and_then(|to| own.get(to.as_str()))) {
                    (Some(from), Some(to)) if from > to => {}
                    _ => drop(wrong.insert(format!("src/{name}.rs imports {}", path.join("::")))),
                }
                continue;
            }
            let height = |name: &str| floors[""].get(name);
            match (height(top), height(target)) {
                (Some(from), Some(to)) if from > to => {}
                _ => drop(wrong.insert(format!("src/{name}.rs imports {}", path.join("::")))),
            }
        }
    }
    wrong
}

fn document() -> Floors {
    floors(&fs::read_to_string(root().join("docs/architecture.md")).unwrap())
}

#[test]
fn no_file_imports_from_its_own_floor_or_a_higher_one() {
    let wrong = arrows_upwards(&document(), &sources());
    assert!(wrong.is_empty(), "against docs/architecture.md:\n{}", Vec::from_iter(wrong).join("\n"));
}

#[test]
fn the_list_names_every_file_and_no_other() {
    let (floors, sources) = (document(), sources());
    let listed: BTreeSet<String> = floors
        .iter()
        .flat_map(|(folder, files)| {
            files
                .keys()
                .map(move |file| if folder.is_empty() { file.clone() } else { format!("{folder}/{file}") })
        })
        .collect();
    assert_eq!(listed, sources.into_keys().collect());
}

/// A folder's `mod.rs` cannot forbid what is in its files.
#[test]
fn files_without_unsafe_code_forbid_it_and_the_readme_names_the_others() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let table = readme.split("| where | unsafe because |").nth(1).unwrap();
    let table: String = table.lines().take_while(|line| line.is_empty() || line.starts_with('|')).collect();
    let sources = sources();
    let mut wrong = Vec::new();
    for (name, text) in &sources {
        let is_folder = sources.keys().any(|other| other.starts_with(&format!("{name}/")));
        let has_unsafe = code(text).replace("unsafe_code", "").contains("unsafe");
        let folder = name.split_once('/').map_or(name.as_str(), |(folder, _)| folder);
        let named = [format!("`{name}.rs`"), format!("`{folder}/`")].iter().any(|name| table.contains(name));
        match (has_unsafe, text.contains("#![forbid(unsafe_code)]")) {
            (true, _) if !named => wrong.push(format!("the README's table does not name {name}")),
            (false, false) if !is_folder && name != "lib" => wrong.push(format!("{name} does not forbid it")),
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn an_arrow_upwards_and_one_sideways_are_noticed() {
    let floors = floors("```floors\nlib\nb c\na\n```\n```floors a\ntop\nlow\n```\n");
    let try_it = |name: &str, text: &str| {
        let mut sources: BTreeMap<_, _> =
            ["a", "a/low", "a/top", "b", "c"].map(|name| (name.to_owned(), String::new())).into();
        sources.insert(name.to_owned(), text.to_owned());
        arrows_upwards(&floors, &sources).len()
    };
    assert_eq!(try_it("b", "use crate::a::low::X;\nuse core::fmt;"), 0);
    assert_eq!(try_it("b", "use crate::c::X;"), 1);
    assert_eq!(try_it("a/low", "use crate::{b, c::{X, Y}};"), 2);
    assert_eq!(try_it("a/low", "fn f() { crate::b::g() }"), 1);
    assert_eq!(try_it("a/low", "use super::top::X;"), 1);
    assert_eq!(try_it("a/top", "use super::{low, low::X};"), 0);
    assert_eq!(try_it("a/low", "use crate::a;"), 1);
    assert_eq!(try_it("a/low", "// crate::b\n#[cfg(test)]\nmod tests { use crate::b; }"), 0);
}
