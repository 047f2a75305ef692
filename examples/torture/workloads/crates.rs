//! Crates that many programs use.

use std::collections::BTreeMap;
use std::io::{Cursor, Read, Write};
use std::sync::LazyLock;

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::{DeflateEncoder, GzEncoder};
use itertools::Itertools;
use quote::ToTokens;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256, Sha512};

use super::Workload;

pub const WORKLOADS: &[Workload] = &[
    Workload::clean("serde_json", json),
    Workload::clean("serde", typed),
    Workload::clean("toml", toml),
    Workload::clean("syn", syn),
    Workload::clean("regex", regex),
    Workload::clean("sha2", sha2),
    Workload::clean("flate2", flate2),
    Workload::clean("png", png),
    Workload::clean("pulldown-cmark", markdown),
    Workload::clean("minijinja", templates),
    Workload::clean("rhai", rhai),
    Workload::clean("itertools", itertools),
    Workload::clean("csv", csv),
];

fn json() -> String {
    let text = r#"{"name":"torture","list":[1,-2.5e3,true,null,"\u00e4\n"],"deep":{"er":{"est":[[],{}]}}}"#;
    let value: serde_json::Value = serde_json::from_str(text).unwrap();
    let error = serde_json::from_str::<serde_json::Value>(r#"{"a": [1, 2,, 3]}"#).unwrap_err();
    let built = serde_json::json!({"value": value, "sum": 1 + 2, "nested": {"text": "a \"quoted\" one"}});
    format!("{value} {error} {}", serde_json::to_string_pretty(&built).unwrap())
}

#[derive(Serialize, Deserialize, Debug, PartialEq)]
struct Package {
    name: String,
    version: (u32, u32, u32),
    kind: Kind,
    dependencies: BTreeMap<String, Option<String>>,
    weight: f32,
}

#[derive(Serialize, Deserialize, Debug, PartialEq)]
#[serde(tag = "is")]
enum Kind {
    Library { public: bool },
    Program { arguments: Vec<String> },
}

fn packages() -> Vec<Package> {
    let dependency = |name: &str| (name.to_string(), (name.len() > 4).then(|| "1.0".to_string()));
    ["regrow", "corosensei"]
        .into_iter()
        .enumerate()
        .map(|(index, name)| Package {
            name: name.to_string(),
            version: (0, index as u32, 7),
            kind: if index == 0 {
                Kind::Library { public: true }
            } else {
                Kind::Program { arguments: vec!["--all".into(), "-v".into()] }
            },
            dependencies: ["libc", "region", "object"].map(dependency).into(),
            weight: 1.25 * index as f32,
        })
        .collect()
}

fn typed() -> String {
    let text = serde_json::to_string(&packages()).unwrap();
    let back: Vec<Package> = serde_json::from_str(&text).unwrap();
    assert_eq!(back, packages());
    let error = serde_json::from_str::<Package>(r#"{"name": "x", "version": [1, 2]}"#).unwrap_err();
    format!("{back:?} {error}")
}

fn toml() -> String {
    let text = "title = \"torture\"\n[owner]\nborn = 1979-05-27T07:32:00Z\n[[server]]\nip = '10.0.0.1'\nports = [80, 443]\n";
    let table: toml::Table = toml::from_str(text).unwrap();
    let error = toml::from_str::<toml::Table>("a = 1\na = 2\n").unwrap_err();
    format!("{table:?} {} {error}", toml::to_string(&table).unwrap())
}

fn syn() -> String {
    let source = "impl<T: Clone> Stack<T> { pub fn push(&mut self, value: T) -> Result<(), Full> \
                  { if self.len >= N { return Err(Full) } self.items[self.len] = Some(value.clone()); self.len += 1; Ok(()) } }";
    let file: syn::File = syn::parse_str(source).unwrap();
    let error = syn::parse_str::<syn::Expr>("1 + ").unwrap_err();
    format!("{} {error}", file.to_token_stream())
}

fn regex() -> String {
    // Compiled on the plain thread that ran before: compiling is unclean (`regex-compile`).
    static DATES: LazyLock<regex::Regex> =
        LazyLock::new(|| regex::Regex::new(r"(?<year>\d{4})-(?<month>\d{2})(?:-(\d{2}))?").unwrap());
    let dates = &*DATES;
    let text = "from 1999-12-31 to 2000-01 and 2024-02-29, not 99-1-1";
    let found: Vec<_> =
        dates.captures_iter(text).map(|c| (c["year"].to_string(), c.get(3).map(|m| m.start()))).collect();
    let replaced = dates.replace_all(text, "$month/$year");
    format!("{found:?} {replaced}")
}

fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|index| (index * index / 7 % 251) as u8).collect()
}

fn sha2() -> String {
    let mut hash = Sha256::new();
    bytes(3000).chunks(97).for_each(|chunk| hash.update(chunk));
    format!("{:x} {:x}", hash.finalize(), Sha512::digest(bytes(1000)))
}

fn flate2() -> String {
    let data = bytes(600);
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(&data).unwrap();
    let packed = encoder.finish().unwrap();
    let mut back = Vec::new();
    GzDecoder::new(&packed[..]).read_to_end(&mut back).unwrap();
    assert_eq!(back, data);
    let mut fast = DeflateEncoder::new(Vec::new(), Compression::fast());
    fast.write_all(&data[..300]).unwrap();
    let error = GzDecoder::new(&packed[..20]).read_to_end(&mut Vec::new()).unwrap_err();
    format!("{} {} {error}", packed.len(), fast.finish().unwrap().len())
}

fn png() -> String {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, 12, 8);
    encoder.set_color(png::ColorType::Rgb);
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(&bytes(12 * 8 * 3)).unwrap();
    writer.finish().unwrap();
    let mut reader = png::Decoder::new(Cursor::new(&file)).read_info().unwrap();
    let mut image = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut image).unwrap();
    assert_eq!(image, bytes(12 * 8 * 3));
    format!("{} {info:?}", file.len())
}

fn markdown() -> String {
    let text = "# Title\n\nA *paragraph* with `code`, [a link](http://x.org \"t\") and **bold _both_**.\n\n\
                - one\n- two\n  1. nested\n\n> quoted\n\n```rust\nfn main() {}\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n";
    let mut html = String::new();
    pulldown_cmark::html::push_html(
        &mut html,
        pulldown_cmark::Parser::new_ext(text, pulldown_cmark::Options::all()),
    );
    html
}

fn templates() -> String {
    let mut environment = minijinja::Environment::new();
    let template = "{% for user in users %}{{ loop.index }}. {{ user.name|upper }}{% if user.admin %} (admin){% endif %}\n\
                    {% else %}nobody{% endfor %}{{ users|length }} {{ 'a' ~ 12 }}";
    environment.add_template("users", template).unwrap();
    let users = minijinja::context! { users => vec![
        minijinja::context! { name => "ada", admin => true },
        minijinja::context! { name => "brian", admin => false },
    ] };
    let error = environment.add_template("broken", "{% for %}").unwrap_err();
    format!("{} {error}", environment.get_template("users").unwrap().render(users).unwrap())
}

fn rhai() -> String {
    let mut engine = rhai::Engine::new();
    engine.register_fn("host", |x: i64| x * 3);
    let script = r#"
        fn fib(n) { if n < 2 { n } else { fib(n - 1) + fib(n - 2) } }
        let list = [];
        for i in 0..5 { list.push(fib(i)); }
        let map = #{ name: "rhai", sum: list.reduce(|sum, x| sum + x, 0) };
        let text = `${map.name}: ${list}`;
        while map.sum < 100 { map.sum = host(map.sum); }
        text + " " + map.sum + " " + list.filter(|x| x % 2 == 1).len()
    "#;
    let value: String = engine.eval(script).unwrap();
    let error = engine.eval::<i64>("let x = 1; x.missing()").unwrap_err();
    format!("{value} {error}")
}

fn itertools() -> String {
    let local = Vec::from([5, 3, 8, 1, 9, 2]); // not an array: `sorted` makes a vector of references
    let sorted = local.iter().sorted_by_key(|n| (*n % 3, **n)).join("<");
    let pairs: Vec<_> = local.iter().tuple_combinations().filter(|(a, b)| (*a + *b) % 4 == 0).collect();
    let product = local.iter().cartesian_product("ab".chars()).map(|(n, c)| format!("{n}{c}")).join(" ");
    let runs: Vec<_> = local.iter().dedup_by(|a, b| *a % 2 == *b % 2).copied().collect();
    format!("{sorted} {pairs:?} {product} {runs:?} {:?}", local.iter().minmax())
}

fn csv() -> String {
    let text = "name,born,note\nAda,1815,\"first, of all\"\n\"Gr\"\"ace\",1906,\nBroken,x\n";
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(text.as_bytes());
    let headers = reader.headers().unwrap().clone();
    let records: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
    let mut writer = csv::Writer::from_writer(Vec::new());
    for record in &records[..2] {
        writer.serialize((&record[0], record[1].parse::<u32>().unwrap(), &record[2])).unwrap();
    }
    let written = String::from_utf8(writer.into_inner().unwrap()).unwrap();
    format!("{headers:?} {records:?} {written}")
}
