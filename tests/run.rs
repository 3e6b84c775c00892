//! `qconv run`: prompts from everywhere, stop strings, conversations whose tokens are read once, and
//! what ends an answer.
#![cfg(feature = "ggml")]

mod common;
#[path = "common/place.rs"]
mod place;

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::AtomicBool;

use place::{Place, check_refusal};
use qconv::eval::generate::{End, Options, Session, tokenize_prompt};
use qconv::eval::sample::Sampling;
use qconv::ggml::{Model, ModelOptions};
use serde_json::Value as Json;

const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}\
    {% if add_generation_prompt %}assistant:{% endif %}";

/// A place with a model `m.gguf` that continues text, and has a chat template.
fn talking() -> Place {
    let place = Place::new();
    let source = common::fixture("tiny-llama");
    let template = format!("tokenizer.chat_template={TEMPLATE}");
    let args = ["hf-to-gguf", source.to_str().unwrap(), "-o", "m.gguf", "--set", &template];
    place.succeeds(&[&args[..], &["--no-verify", "-q"]].concat());
    place
}

fn command(place: &Place, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qconv"));
    command.args(["run", "m.gguf", "-j", "1"]).args(args).current_dir(place.0.path());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// `qconv run m.gguf` with this on stdin.
fn run(place: &Place, args: &[&str], stdin: &str) -> Output {
    let mut child = command(place, args).spawn().unwrap();
    // One that refuses its arguments may be gone already.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(place: &Place, args: &[&str], stdin: &str) -> String {
    let output = run(place, args, stdin);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(place: &Place, args: &[&str], stdin: &str) -> Json {
    serde_json::from_str(&text(place, &[args, &["--json"]].concat(), stdin)).unwrap()
}

fn lines(place: &Place, args: &[&str], stdin: &str) -> Vec<Json> {
    let out = text(place, &[args, &["--json"]].concat(), stdin);
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn prompts_come_from_everywhere() {
    let place = talking();
    let prompt = "It was a fine morning, and";
    let options = ["--temp", "0", "-n", "12"];
    let expected = text(&place, &[&["-p", prompt], &options[..]].concat(), "");
    assert!(expected.len() > 20 && expected.ends_with('\n'), "{expected:?}");
    fs::write(place.path("prompt.txt"), format!("{prompt}\r\n")).unwrap();
    for (args, stdin) in
        [(&["-p", "-"][..], prompt), (&[], &format!("{prompt}\n")), (&["-f", "prompt.txt"], "")]
    {
        assert_eq!(text(&place, &[args, &options].concat(), stdin), expected, "{args:?}");
    }
    let whole = json(&place, &[&["-p", prompt], &options[..]].concat(), "");
    assert_eq!(whole["text"].as_str().unwrap(), expected.strip_suffix('\n').unwrap());
    assert_eq!(whole["finish_reason"], "length");
    assert_eq!(whole["generated_tokens"], 12);
    assert_eq!(whole["cached_tokens"], 0);
    for key in ["prompt_tokens", "load_seconds", "prompt_tokens_per_second", "generation_tokens_per_second"] {
        assert!(whole[key].as_f64().unwrap() > 0.0, "{key} in {whole}");
    }
    // The default length, and one beyond the context.
    assert_eq!(json(&place, &["-p", prompt, "--temp", "0"], "")["generated_tokens"], 128);
    let until_full = json(&place, &["-p", prompt, "--seed", "1", "-n", "-1", "-c", "256"], "");
    let n = |key: &str| until_full[key].as_u64().unwrap();
    assert_eq!(until_full["finish_reason"], "length");
    assert_eq!(n("prompt_tokens") + n("generated_tokens"), 257);
}

#[test]
fn seeds_repeat_and_options_reach_the_sampler() {
    let place = talking();
    let prompt = ["-p", "It was", "-n", "24"];
    let with = |options: &[&str]| json(&place, &[&prompt, options].concat(), "")["text"].clone();
    assert_eq!(with(&["--seed", "7"]), with(&["--seed", "7"]));
    assert_ne!(with(&["--seed", "7"]), with(&["--seed", "8"]));
    let random = json(&place, &prompt, "");
    assert_eq!(with(&["--seed", &random["seed"].to_string()]), random["text"]);
    let greedy = with(&["--temp", "0"]);
    for same in [&["--top-k", "1"][..], &["--top-p", "0"], &["--min-p", "1"]] {
        assert_eq!(with(same), greedy, "{same:?}");
    }
    assert_ne!(with(&["--temp", "0", "--repeat-penalty", "3", "--repeat-last-n", "-1"]), greedy);
    assert_eq!(with(&["--temp", "0", "--repeat-penalty", "3", "--repeat-last-n", "0"]), greedy);
    // What the model recommends counts where nothing is given.
    let source = common::fixture("tiny-llama");
    let convert = ["hf-to-gguf", source.to_str().unwrap(), "-o", "m.gguf", "--force", "--no-verify", "-q"];
    place.succeeds(&[&convert[..], &["--set", "general.sampling.temp=f32:0"]].concat());
    assert_eq!(with(&[]), greedy);
    assert_eq!(with(&["--temp", "0.8", "--seed", "7"]), with(&["--seed", "7", "--temp", "0.8"]));
    assert_ne!(with(&["--temp", "0.8", "--seed", "7"]), greedy);
}

#[test]
fn nothing_of_a_stop_string_is_printed() {
    let place = talking();
    let args = ["-p", "It was a fine morning, and", "--temp", "0", "-n", "60"];
    let whole = json(&place, &args, "")["text"].as_str().unwrap().to_string();
    // Every beginning and length, across the tokens' borders.
    for (at, len) in [(3, 1), (9, 2), (14, 9), (40, 17)] {
        let stop: String = whole.chars().skip(at).take(len).collect();
        let expected = whole.split(&stop).next().unwrap();
        let found = json(&place, &[&args[..], &["--stop", &stop]].concat(), "");
        assert_eq!(found["text"].as_str().unwrap(), expected, "{stop:?}");
        assert_eq!((&found["finish_reason"], &found["stop"]), (&"stop".into(), &stop.as_str().into()));
        let plain = text(&place, &[&args[..], &["--stop", &stop, "--stop", "\u{4e2d}"]].concat(), "");
        assert_eq!(plain, format!("{expected}\n"));
    }
    assert_eq!(json(&place, &[&args[..], &["--stop", "\u{4e2d}"]].concat(), "")["text"], whole.as_str());
}

#[test]
fn a_conversation_reads_each_token_once() {
    let place = talking();
    let args = ["--chat", "--temp", "0", "-n", "16", "--system", "Be kind."];
    let answers = lines(&place, &args, "How are you?\n\nWhat is \\\nthis?\n");
    assert_eq!(answers.len(), 2);
    // The same as one question without the loop, and as a prompt in the template's words.
    let first = answers[0]["text"].as_str().unwrap();
    assert_eq!(json(&place, &[&args[..], &["-p", "How are you?"]].concat(), "")["text"], first);
    let written =
        format!("system:Be kind.\nuser:How are you?\nassistant:{first}\nuser:What is \nthis?\nassistant:");
    let plain = json(&place, &["--temp", "0", "-n", "16"], &written);
    assert_eq!(plain["text"], answers[1]["text"]);
    assert_eq!(plain["prompt_tokens"], answers[1]["prompt_tokens"]);
    let n = |i: usize, key: &str| answers[i][key].as_u64().unwrap();
    assert_eq!(n(0, "cached_tokens"), 0);
    // All but the answer's last token, which was not decoded.
    let read = n(0, "prompt_tokens") + n(0, "generated_tokens") - 1;
    assert!((read - 3..=read).contains(&n(1, "cached_tokens")), "{answers:?}");

    let again =
        lines(&place, &args, "How are you?\n/reset\nHow are you?\n/system\nHow are you?\n/exit\nno\n");
    assert_eq!(again.len(), 3);
    assert_eq!(again[0]["text"], again[1]["text"]);
    assert_eq!(
        again[2]["text"],
        json(&place, &["--chat", "--temp", "0", "-n", "16", "-p", "How are you?"], "")["text"]
    );
    let output = run(&place, &["--chat"], "/help\n/nothing here\n");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && output.stdout.is_empty());
    assert!(said.contains("/system TEXT") && said.contains("/nothing is no command"), "{said}");
}

#[test]
fn a_long_conversation_forgets_its_beginning() {
    let place = talking();
    let question = "What did she say of the house, and of all the people who came to see it?\n";
    let args = ["--chat", "--temp", "0", "-n", "60", "-c", "256", "--json"];
    let output = run(&place, &args, &question.repeat(5));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("the context of 256 tokens is full; the oldest question is forgotten"), "{said}");
    let counts: Vec<u64> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|l| serde_json::from_str::<Json>(l).unwrap()["prompt_tokens"].as_u64().unwrap())
        .collect();
    assert_eq!(counts.len(), 5);
    assert!(counts.iter().all(|&n| n <= 256 - 60) && counts[1] > counts[0], "{counts:?}");
    let output = run(&place, &args, &"house ".repeat(300));
    check_refusal(&output, "a question longer than the context", &["m.gguf", "196 fit the context", "-c"]);
}

/// For each kind of memory: what is kept of it gives the answer of a context that read all anew.
#[test]
fn what_is_kept_is_what_would_be_read() {
    let place = Place::new();
    for name in ["tiny-llama", "models/gemma3-spm", "models/mamba2", "models/lfm2_moe", "models/qwen3"] {
        let file = place.path("x.gguf");
        common::convert(&common::fixture(name), &file, Some("f32"));
        let model = Model::load(&file, &ModelOptions::default()).unwrap();
        let options = Options { max_tokens: Some(8), stop: Vec::new(), sampling: Sampling::greedy() };
        let never = AtomicBool::new(false);
        let mut kept = Session::new(&model, 256, 1).unwrap();
        let mut ids: Vec<i32> = (0..40).map(|i| 5 + i * 7 % 60).collect();
        let mut cached = Vec::new();
        // Further on, the same, back to the middle with another end, and something else.
        for step in 0..4 {
            match step {
                1 => ids.extend([9, 11, 13]),
                2 => ids.splice(30.., [50, 51, 52]).for_each(drop),
                3 => ids[0] += 1,
                _ => {}
            }
            let found = kept.generate(&ids, &options, &never, &mut |_| Ok(())).unwrap();
            let mut anew = Session::new(&model, 256, 1).unwrap();
            let expected = anew.generate(&ids, &options, &never, &mut |_| Ok(())).unwrap();
            assert_eq!(found.generated, expected.generated, "{name}, step {step}");
            assert_eq!(expected.cached_tokens, 0);
            cached.push(found.cached_tokens);
        }
        let recurrent = ["models/mamba2", "models/lfm2_moe"].contains(&name);
        assert_eq!(cached, if recurrent { [0; 4] } else { [0, 40, 30, 0] }, "{name}");
    }
}

#[test]
fn encoder_and_decoder_generate_too() {
    let place = Place::new();
    let source = common::fixture("models/t5");
    common::convert(&source, &place.path("m.gguf"), Some("f32"));
    let model = Model::load(place.path("m.gguf"), &ModelOptions::default()).unwrap();
    let (prompt, logits) = common::reference(&source);
    let options = Options { max_tokens: Some(1), stop: Vec::new(), sampling: Sampling::greedy() };
    let mut session = Session::new(&model, 128, 1).unwrap();
    let found = session.generate(&prompt, &options, &AtomicBool::new(false), &mut |_| Ok(())).unwrap();
    let likeliest = qconv::eval::logits::argmax(&logits).unwrap() as i32;
    let first = match found.end {
        End::EndOfGeneration(id) => id,
        _ => found.generated[0],
    };
    assert_eq!(first, likeliest);
    // The encoder gets its end of sequence.
    let ids = tokenize_prompt(&model, "the house").unwrap();
    assert_eq!(ids.last(), model.special_tokens().eos.as_ref());
    assert!(!run(&place, &["-p", "the house", "-n", "4"], "").stdout.is_empty());
}

#[test]
fn what_cannot_be_run_is_said() {
    let place = talking();
    let refused = |args: &[&str], stdin: &str, says: &[&str]| {
        check_refusal(&run(&place, args, stdin), &format!("{args:?}"), says);
    };
    refused(&["-c", "256"], &"house ".repeat(300), &["m.gguf", "the context 256", "-c"]);
    place.refuses(&["run", "m.gguf", "-f", "none.txt"], &["none.txt"]);
    place.refuses(&["run", "m.gguf", "-p", "x", "--lora", "m.gguf"], &["an adapter was expected"]);
    let output = run(&place, &["-p", "x", "--temp=-1"], "");
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("0 or more"));

    common::convert(&common::fixture("tiny-llama"), &place.path("m.gguf"), None);
    refused(&["--chat"], "Hello\n", &["m.gguf", "no chat template", "run without --chat"]);
    refused(&["--chat", "-p", "Hello"], "", &["no chat template"]);
    common::convert(&common::fixture("models/bert"), &place.path("m.gguf"), None);
    refused(&["-p", "Hello"], "", &["m.gguf", "an encoder", "qconv embed"]);
}

/// Ctrl-C ends an answer and not the conversation; where none is written, the program.
#[cfg(unix)]
#[test]
fn an_interrupt_ends_the_answer() {
    let place = talking();
    let mut child = command(&place, &["--chat", "--seed", "3", "-c", "1024"]).spawn().unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let interrupt = || {
        let id = child.id().to_string();
        assert!(Command::new("kill").args([common::interrupt(), &id]).status().unwrap().success());
    };
    stdin.write_all(b"What did she say?\n").unwrap();
    let mut byte = [0; 1];
    stdout.read_exact(&mut byte).unwrap();
    interrupt();
    // The end of the line comes with the end of the answer.
    let mut first = byte.to_vec();
    stdin.write_all(b"/help\n").unwrap();
    while !first.ends_with(b"\n") {
        stdout.read_exact(&mut byte).unwrap();
        first.extend(byte);
    }
    stdin.write_all(b"And then?\n").unwrap();
    stdout.read_exact(&mut byte).unwrap();
    interrupt();
    std::thread::sleep(std::time::Duration::from_millis(300));
    interrupt();
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
}
