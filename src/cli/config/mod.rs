//! Configuration files: what stands on the command line can stand in a YAML or TOML file.
//!
//! Keys are the long names of options, or the names of arguments that have none. They are turned into
//! arguments before clap parses, so that each command's options are known in one place. What is typed wins.

mod read;

use std::any::TypeId;
use std::collections::HashSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, Command, Id};
use qconv::error::{Error, Result};
use serde_json::{Map, Value as Json};

use self::read::Form;

/// Name and text of every file in `formats/config/`.
static EMBEDDED: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/config.rs"));

/// The name of the option.
const OPTION: &str = "config";
/// The key that lists several models.
const MODELS: &str = "models";
/// Most models in a file: each repeats what is common to all.
const MOST_MODELS: usize = 256;

/// Gives the option to every command.
pub fn with_option(command: Command) -> Command {
    if command.has_subcommands() {
        return command.mut_subcommands(with_option);
    }
    command.arg(Arg::new(OPTION).long(OPTION).value_name("FILE|NAME").help(format!(
        "Take options from a YAML or TOML file, by their long names; what is typed wins. For quantize and \
         hf-to-gguf there are {}",
        embedded_names()
    )))
}

fn embedded_names() -> String {
    EMBEDDED.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

/// The command lines that `args` stand for: themselves where no file is named, one for each model of a file.
///
/// # Errors
/// `Misuse` for unknown keys and values of the wrong kind; what is no YAML or TOML; `Io`.
pub fn expand(mut command: Command, args: Vec<OsString>) -> Result<Vec<Vec<OsString>>> {
    command.build();
    let mut leaf = &command;
    let mut depth = 1;
    while let Some(next) = args.get(depth).and_then(|a| leaf.find_subcommand(a)) {
        leaf = next;
        depth += 1;
    }
    let (head, tail) = args.split_at(depth.min(args.len()));
    let typed = Typed::read(leaf, tail);
    let Some(name) = typed.config.as_ref().filter(|_| depth > 1) else { return Ok(vec![args]) };
    let (document, place) = load(Path::new(name))?;
    let at = |e: Error| e.at(Path::new(name));
    let each = models(document).map_err(at)?;
    let lines = each.into_iter().map(|model| {
        let found = translate(leaf, &model, &typed, &place)?;
        let mut line = head.to_vec();
        line.extend(found.options);
        line.extend(typed.rest.iter().cloned());
        if !found.positionals.is_empty() && !typed.ended {
            line.push("--".into());
        }
        line.extend(found.positionals);
        Ok(line)
    });
    lines.collect::<Result<_>>().map_err(at)
}

/// What was typed, as far as it matters here.
#[derive(Default)]
struct Typed {
    options: HashSet<Id>,
    positionals: usize,
    config: Option<OsString>,
    /// Everything but the file.
    rest: Vec<OsString>,
    /// Whether there was a `--`.
    ended: bool,
}

impl Typed {
    fn read(command: &Command, args: &[OsString]) -> Self {
        let mut typed = Self::default();
        let mut args = args.iter().peekable();
        while let Some(arg) = args.next() {
            let text = arg.to_string_lossy();
            if typed.ended || !text.starts_with('-') || text == "-" {
                typed.positionals += 1;
                typed.rest.push(arg.clone());
                continue;
            }
            let (option, attached) = match text.strip_prefix("--") {
                Some("") => {
                    typed.ended = true;
                    (None, None)
                }
                Some(long) => {
                    let (name, value) = long.split_once('=').map_or((long, None), |(n, v)| (n, Some(v)));
                    (command.get_arguments().find(|a| a.get_long() == Some(name)), value)
                }
                None => typed.short(command, &text[1..]),
            };
            let mut values = Vec::new();
            if let Some(option) = option {
                let most =
                    option.get_num_args().filter(|_| takes_values(option)).map_or(0, |n| n.max_values());
                let is_value =
                    |n: usize, next: &&&OsString| n == 0 || !next.to_string_lossy().starts_with('-');
                while attached.is_none()
                    && values.len() < most
                    && let Some(value) = args.peek().filter(|next| is_value(values.len(), next))
                {
                    values.push((*value).clone());
                    args.next();
                }
                if option.get_id() == OPTION {
                    typed.config = attached.map(OsString::from).or_else(|| values.pop());
                    continue;
                }
                typed.options.insert(option.get_id().clone());
            }
            typed.rest.push(arg.clone());
            typed.rest.append(&mut values);
        }
        typed
    }

    /// Options in one argument, such as `-qt`; the last may have a value.
    fn short<'c, 't>(&mut self, command: &'c Command, text: &'t str) -> (Option<&'c Arg>, Option<&'t str>) {
        for (at, letter) in text.char_indices() {
            let option = command.get_arguments().find(|a| a.get_short() == Some(letter));
            let Some(option) = option else { break };
            if takes_values(option) {
                let value = &text[at + letter.len_utf8()..];
                return (Some(option), Some(value).filter(|v| !v.is_empty()));
            }
            self.options.insert(option.get_id().clone());
        }
        (None, None)
    }
}

fn takes_values(option: &Arg) -> bool {
    option.get_action().takes_values()
}

/// A file, or one that comes with the program, and the directory that its paths start from.
fn load(name: &Path) -> Result<(Map<String, Json>, PathBuf)> {
    let embedded = EMBEDDED.iter().find(|(own, _)| name.as_os_str() == *own);
    let document = match (embedded, Form::of(name)) {
        (Some((_, text)), _) => Form::Toml.parse(text).map_err(|e| e.at(name))?,
        (None, Some(form)) => form.read(name)?,
        (None, None) => {
            let what = "is no configuration: a file ends in .yaml or .toml, and there are";
            return Err(Error::misuse(format!("{what} {}", embedded_names())).at(name));
        }
    };
    match document {
        Json::Object(map) => Ok((map, name.parent().map(Path::to_path_buf).unwrap_or_default())),
        _ => Err(Error::malformed("a configuration is a table of options and their values").at(name)),
    }
}

/// What each model is made with: the common entries, and its own over them.
fn models(mut document: Map<String, Json>) -> Result<Vec<Map<String, Json>>> {
    let Some(list) = document.remove(MODELS) else { return Ok(vec![document]) };
    let Json::Array(list) = list else {
        return Err(Error::misuse(format!("{MODELS}: a list of tables was expected")));
    };
    if list.is_empty() {
        return Err(Error::misuse(format!("{MODELS}: the list is empty")));
    }
    if list.len() > MOST_MODELS {
        let found = list.len();
        return Err(Error::limit(format!("{MODELS}: {found} were found, at most {MOST_MODELS} are allowed")));
    }
    let over = |own: Json| match own {
        Json::Object(own) => {
            let mut all = document.clone();
            all.extend(own);
            Ok(all)
        }
        other => Err(Error::misuse(format!("{MODELS}: {other} is no table of options and their values"))),
    };
    list.into_iter().map(over).collect()
}

#[derive(Default)]
struct Found {
    options: Vec<OsString>,
    positionals: Vec<OsString>,
}

/// The arguments that the entries of a file stand for, but for what was typed.
fn translate(command: &Command, entries: &Map<String, Json>, typed: &Typed, place: &Path) -> Result<Found> {
    let mut found = Found::default();
    for (key, value) in entries {
        let option = find(command, key).ok_or_else(|| unknown(command, key))?;
        if option.is_positional() {
            continue;
        }
        let typed_instead = |id: &Id| typed.options.contains(id);
        let opposes = command.get_arg_conflicts_with(option);
        if typed_instead(option.get_id()) || opposes.iter().any(|a| typed_instead(a.get_id())) {
            continue;
        }
        for text in texts(option, key, value, place)? {
            let mut arg = OsString::from(format!("--{key}"));
            if let Some(text) = text {
                arg.push("=");
                arg.push(text);
            }
            found.options.push(arg);
        }
    }
    for (at, option) in command.get_positionals().enumerate().skip(typed.positionals) {
        let Some((key, value)) = entries.iter().find(|(key, _)| find(command, key) == Some(option)) else {
            continue;
        };
        if found.positionals.is_empty() && at > typed.positionals {
            return Err(Error::misuse(format!("{key} is given, but not what comes before it"))
                .hint("name the source in the file or on the command line"));
        }
        found.positionals.extend(texts(option, key, value, place)?.into_iter().flatten());
    }
    Ok(found)
}

/// The name by which a file calls an argument.
fn key_of(option: &Arg) -> String {
    match option.get_long() {
        Some(long) => long.into(),
        None => option.get_id().as_str().replace('_', "-"),
    }
}

fn find<'c>(command: &'c Command, key: &str) -> Option<&'c Arg> {
    let own = |a: &&Arg| ![OPTION, "help", "version"].contains(&a.get_id().as_str());
    command.get_arguments().filter(own).find(|a| key_of(a) == key)
}

fn unknown(command: &Command, key: &str) -> Error {
    let names = command.get_arguments().map(key_of);
    let likeness = |name: &String| strsim::jaro_winkler(name, &key.replace('_', "-"));
    let nearest = names.max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    let e = Error::misuse(format!("{key:?} is no option of qconv {}", command.get_name()));
    match nearest.filter(|n| likeness(n) > 0.7) {
        Some(name) => e.hint(format!("there is {name}")),
        None => e,
    }
}

/// The values of an option, each for one argument; `None` for one that has no value.
fn texts(option: &Arg, key: &str, value: &Json, place: &Path) -> Result<Vec<Option<OsString>>> {
    let wrong = |expected: &str| Error::misuse(format!("{key}: {value} was found, {expected} was expected"));
    let may_lack_value = option.get_num_args().is_some_and(|n| n.min_values() == 0);
    match value {
        Json::Bool(true) if may_lack_value || !takes_values(option) => return Ok(vec![None]),
        Json::Bool(false) if may_lack_value || !takes_values(option) => return Ok(Vec::new()),
        Json::Null => return Ok(Vec::new()),
        _ if !takes_values(option) => return Err(wrong("true or false")),
        _ => {}
    }
    let scalar = |value: &Json| match value {
        Json::String(text) => Ok(text.clone()),
        Json::Number(n) => Ok(n.to_string()),
        Json::Bool(b) => Ok(b.to_string()),
        _ => Err(wrong("a text or a number, or a list of them")),
    };
    let parser = option.get_value_parser().type_id();
    let is_scaled = parser == TypeId::of::<(PathBuf, f32)>();
    let all = match value {
        Json::Array(list) => list.iter().map(scalar).collect::<Result<_>>()?,
        // Such as tensor-type: {attn_v: q8_0}, or merge-lora: {adapter: 0.5}.
        Json::Object(pairs) if matches!(option.get_action(), ArgAction::Append) => {
            let sign = if is_scaled { ':' } else { '=' };
            pairs.iter().map(|(name, v)| Ok(format!("{name}{sign}{}", scalar(v)?))).collect::<Result<_>>()?
        }
        other => vec![scalar(other)?],
    };
    let is_path = is_scaled || parser == TypeId::of::<PathBuf>();
    let from_place = |text: String| match is_path && text != "-" && text != "builtin" {
        true => place.join(text).into_os_string(),
        false => text.into(),
    };
    Ok(all.into_iter().map(|text| Some(from_place(text))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command() -> Command {
        super::super::command()
    }

    fn expanded(dir: &Path, args: &[&str]) -> Result<Vec<String>> {
        let args = ["qconv"].iter().chain(args).map(OsString::from).collect();
        let shown = |line: Vec<OsString>| {
            let parsed = command().try_get_matches_from(&line);
            assert!(parsed.is_ok(), "{line:?}: {}", parsed.err().map(|e| e.to_string()).unwrap_or_default());
            line.iter()
                .map(|a| a.to_string_lossy().replace(&*dir.to_string_lossy(), "DIR"))
                .collect::<Vec<_>>()
                .join(" ")
        };
        Ok(expand(command(), args)?.into_iter().map(shown).collect())
    }

    #[test]
    fn files_become_arguments() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            std::fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name).to_string_lossy().into_owned()
        };
        let yaml = put(
            "a.yaml",
            "type: q4_0\npure: true\nforce: false\nthreads: 2\ntensor-type: {attn_v: q8_0, ffn: q6_k}\n\
             quiet: true\nmoments: m.gguf\nmethod: gptq\nset: [a=1]\nsource: in.gguf\noutput: out.gguf\n",
        );
        let common = "--moments=DIR/m.gguf --method=gptq";
        assert_eq!(
            expanded(dir.path(), &["quantize", "--config", &yaml]).unwrap(),
            [format!(
                "qconv quantize --type=q4_0 --pure --threads=2 --tensor-type=attn_v=q8_0 --tensor-type=ffn=q6_k \
                 --quiet {common} --set=a=1 -- DIR/in.gguf DIR/out.gguf"
            )]
        );
        // What is typed wins, also by its short name, and against what it excludes.
        let config = format!("--config={yaml}");
        assert_eq!(
            expanded(dir.path(), &["quantize", "x.gguf", &config, "-tq5_0", "-v", "--set", "b=2", "-j", "1"])
                .unwrap(),
            [format!(
                "qconv quantize --pure --tensor-type=attn_v=q8_0 --tensor-type=ffn=q6_k {common} \
                 x.gguf -tq5_0 -v --set b=2 -j 1 -- DIR/out.gguf"
            )]
        );
        let batch = put(
            "b.toml",
            "type = 'q4_0'\n[[models]]\nsource = 'a'\noutput = 'b'\n[[models]]\nsource = '/c'\noutput = 'd'\ntype = 'q8_0'\n",
        );
        assert_eq!(
            expanded(dir.path(), &["quantize", "--config", &batch, "--force"]).unwrap(),
            [
                "qconv quantize --type=q4_0 --force -- DIR/a DIR/b",
                "qconv quantize --type=q8_0 --force -- /c DIR/d"
            ]
        );
        for (text, says) in [
            ("tpye: q4_0", "\"tpye\" is no option"),
            ("max_memory: 1G", "\"max_memory\" is no option"),
            ("pure: 3", "true or false"),
            ("type: {a: b}", "a text or a number"),
            ("output: x", "what comes before"),
            ("models: []", "empty"),
            ("models: [a]", "no table"),
            ("- a", "a table"),
            ("a: [", "a.yml"),
            ("config: balanced", "\"config\" is no option"),
        ] {
            let file = put("a.yml", text);
            let e = expanded(dir.path(), &["quantize", "--config", &file]).unwrap_err();
            assert!(e.to_string().contains(says), "{text}: {e}");
            if text.starts_with("max_memory") {
                assert_eq!(e.hint_text(), Some("there is max-memory"));
            }
        }
        assert!(
            expanded(dir.path(), &["quantize", "--config", "biggest"])
                .unwrap_err()
                .to_string()
                .contains("balanced")
        );
    }

    #[test]
    fn what_comes_with_the_program_fits_its_commands() {
        assert!(EMBEDDED.len() >= 4);
        for (name, _) in EMBEDDED {
            expanded(Path::new("-"), &["quantize", "--config", name, "a", "b"]).unwrap();
            expanded(Path::new("-"), &["hf-to-gguf", "a", "--config", name]).unwrap();
        }
    }
}
