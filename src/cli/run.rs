//! `qconv run`: lets a model speak, through the linked llama.cpp, or a Core ML package through our executor.

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use qconv::container::side::read_text;
use qconv::error::{Error, Result};
use qconv::eval::dialogue::Dialogue;
use qconv::eval::engine::Engine;
use qconv::eval::generate::{End, Options, Session, Summary, check_generates, tokenize_prompt};
use qconv::eval::sample::Sampling;
use qconv::limits::Limits;
use serde_json::{Value as Json, json};

use super::runnable::{self, Execution, Ready};
use super::{talk, ui};

/// Run a model: continue a prompt, or talk with it
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The model: a GGUF file (of a split one, the first shard), a .qpack file, a Hugging Face directory or a Core ML package
    pub model: PathBuf,

    /// What to continue, or with --chat what to ask; `-` reads it from stdin, as does a pipe
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file")]
    pub prompt: Option<String>,

    /// Read the prompt from a file
    #[arg(short, long)]
    pub file: Option<PathBuf>,

    /// Put the prompt into the model's chat template, as the user's message; without a prompt, talk:
    /// every line of stdin is a message
    #[arg(long)]
    pub chat: bool,

    /// A system message before the user's
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,

    /// Most tokens to generate; -1 leaves it to the model and the context, as --chat does. 128 by
    /// default
    #[arg(short, long, allow_negative_numbers = true)]
    pub n: Option<i64>,

    /// End at this text, which is not printed; can be repeated
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,

    /// Context length in tokens, prompt and answer together; by default what they need, with --chat
    /// 4096, and at most the model's own
    #[arg(short, long, default_value_t = 0, hide_default_value = true)]
    pub ctx: u32,

    /// Print a JSON object with text, token counts and speeds; when talking, one a line
    #[arg(long)]
    pub json: bool,

    /// Print the text only, no speeds
    #[arg(short, long)]
    pub quiet: bool,

    /// Add a LoRA adapter (a GGUF file), so many times (1); can be repeated
    #[arg(long, value_name = "FILE[:SCALE]", value_parser = super::common::parse_scaled)]
    pub lora: Vec<(PathBuf, f32)>,

    /// Threads; all processors by default
    #[arg(short = 'j', long)]
    pub threads: Option<u32>,

    /// Layers to place on a GPU, where a GPU backend is built in; -1 for all
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    pub gpu_layers: i32,

    /// Round the result of each operation to float16, as devices do (Core ML packages)
    #[arg(long)]
    pub fp16: bool,

    /// Show what llama.cpp says
    #[arg(long)]
    pub log: bool,

    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// Options by llama.cpp's names. What is not given comes from the model (`general.sampling.*`), or is
/// llama.cpp's default.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Sampling, in the order in which it is done, as in llama.cpp")]
pub struct SamplingArgs {
    /// Make repeated tokens less likely; 1 does not [default: the model's, or 1]
    #[arg(long, value_name = "FACTOR", value_parser = above_0)]
    pub repeat_penalty: Option<f32>,

    /// Take this from the logit of a repeated token for each time that it occurred
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub frequency_penalty: f32,

    /// Take this from the logit of a repeated token
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub presence_penalty: f32,

    /// How many last tokens count as repeated; -1 for all [default: the model's, or 64]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub repeat_last_n: Option<i64>,

    /// Choose among this many likeliest tokens; 0 for all [default: the model's, or 40]
    #[arg(long)]
    pub top_k: Option<usize>,

    /// Choose among tokens as informative as is typical, up to this probability together
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = at_least_0)]
    pub typical: f32,

    /// Choose among the likeliest tokens that reach this probability together [default: the
    /// model's, or 0.95]
    #[arg(long, value_parser = at_least_0)]
    pub top_p: Option<f32>,

    /// Choose among tokens at least so probable, relative to the likeliest [default: the model's,
    /// or 0.05]
    #[arg(long, value_parser = at_least_0)]
    pub min_p: Option<f32>,

    /// Temperature; 0 always takes the likeliest token [default: the model's, or 0.8]
    #[arg(long, value_parser = at_least_0)]
    pub temp: Option<f32>,

    /// The same seed gives the same text [default: a random one]
    #[arg(short, long)]
    pub seed: Option<u64>,
}

fn at_least_0(text: &str) -> std::result::Result<f32, String> {
    let value = text.parse().ok().filter(|v: &f32| v.is_finite() && *v >= 0.0);
    value.ok_or_else(|| "a number of 0 or more was expected".into())
}

fn above_0(text: &str) -> std::result::Result<f32, String> {
    at_least_0(text).and_then(|v| if v > 0.0 { Ok(v) } else { Err("must be above 0".into()) })
}

impl SamplingArgs {
    /// What was given, else what the model recommends, else llama.cpp's defaults.
    fn resolve(&self, model: &dyn Engine) -> Sampling {
        fn recommended<T: std::str::FromStr>(model: &dyn Engine, key: &str) -> Option<T> {
            model.recommended(key)?.parse().ok()
        }
        let number = |given: Option<f32>, key: &str, default: f32| {
            let own = || recommended(model, key).filter(|v: &f32| v.is_finite() && *v >= 0.0);
            given.or_else(own).unwrap_or(default)
        };
        let count = |n: i64| usize::try_from(n).ok();
        let d = Sampling::default();
        let last_n = self.repeat_last_n.or_else(|| recommended(model, "penalty_last_n"));
        let repeat_penalty = number(self.repeat_penalty, "penalty_repeat", d.repeat_penalty);
        Sampling {
            temperature: number(self.temp, "temp", d.temperature),
            top_k: self
                .top_k
                .or_else(|| recommended(model, "top_k").map(|k: i64| count(k).unwrap_or(0)))
                .unwrap_or(d.top_k),
            top_p: number(self.top_p, "top_p", d.top_p),
            min_p: number(self.min_p, "min_p", d.min_p),
            typical: self.typical,
            repeat_penalty: if repeat_penalty > 0.0 { repeat_penalty } else { d.repeat_penalty },
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            repeat_last_n: last_n.map_or(d.repeat_last_n, |n| count(n).unwrap_or(usize::MAX)),
            seed: self.seed.unwrap_or_else(random_seed),
        }
    }
}

/// Small enough to be typed again.
fn random_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::from(now.subsec_nanos() ^ (now.as_secs() as u32).wrapping_mul(0x9e37_79b9) ^ std::process::id())
}

/// Generated text goes to stdout, everything else to stderr. `stop` ends an answer between two tokens.
///
/// # Errors
/// When the model cannot be loaded or executed, or stdout cannot be written.
pub fn run(args: &Args, stop: &AtomicBool) -> anyhow::Result<()> {
    #[cfg(feature = "ggml")]
    qconv::ggml::set_verbose(args.log);
    runnable::check_fp16(args.fp16, std::iter::once(args.model.as_path()))?;
    let prompt = prompt(args)?;
    let execution = Execution {
        gpu_layers: args.gpu_layers,
        lora: &args.lora,
        fp16: args.fp16,
        // Rearranged weights compute faster, and nobody looks at them here.
        #[cfg(feature = "ggml")]
        linked: runnable::Linked { threads: args.threads, rearranges: true, quiet: args.quiet },
    };
    let Ready { runs, model, load } = runnable::execute(&args.model, &execution)?;
    let model = &*model;
    check_generates(model).map_err(|e| e.at(&args.model))?;
    let max_tokens = match args.n {
        None => (!args.chat).then_some(128),
        Some(n) => usize::try_from(n).ok(),
    };
    let options = Options { max_tokens, stop: args.stop.clone(), sampling: args.sampling.resolve(model) };
    let out = Output {
        json: args.json,
        quiet: args.quiet,
        load,
        seed: options.sampling.seed,
        converted: runs.json(),
    };
    match prompt {
        Some(prompt) => once(args, model, &prompt, &options, stop, &out),
        None => talk::run(args, model, &options, stop, &out),
    }
    .map_err(|e| e.at(&args.model))?;
    runnable::say_remark(&args.model, model, args.quiet);
    Ok(())
}

/// The prompt; `None` to talk instead.
fn prompt(args: &Args) -> Result<Option<String>> {
    let limit = Limits::default().side_file_bytes;
    let from_stdin = || {
        let mut text = String::new();
        let read = std::io::stdin().lock().take(limit + 1).read_to_string(&mut text);
        match read.map_err(|e| Error::io("read", "stdin", e))? as u64 > limit {
            true => Err(Error::limit(format!("the prompt is longer than {limit} bytes"))),
            false => Ok(text),
        }
    };
    // The line break at the end is the editor's or the shell's.
    let without_break = |mut text: String| {
        let end = text.strip_suffix('\n').map(|t| t.strip_suffix('\r').unwrap_or(t).len());
        text.truncate(end.unwrap_or(text.len()));
        text
    };
    match (args.prompt.as_deref(), &args.file) {
        (Some("-"), _) => from_stdin().map(without_break).map(Some),
        (Some(text), _) => Ok(Some(text.to_string())),
        (None, Some(path)) => read_text(path, limit).map(without_break).map(Some),
        (None, None) if args.chat => Ok(None),
        (None, None) if std::io::stdin().is_terminal() => Err(Error::misuse("there is no prompt")
            .hint("give one with -p TEXT, --file FILE or through a pipe, or talk with --chat")),
        (None, None) => from_stdin().map(without_break).map(Some),
    }
}

/// Most tokens of a context that nobody gave a length for. Its memory is taken at once.
const DEFAULT_CTX: u32 = 4096;

/// As many tokens as were asked for, or those `wanted`, or a usual number; at most the model's own.
pub fn context_length(args: &Args, model: &dyn Engine, wanted: Option<usize>) -> u32 {
    let most = u32::try_from(model.n_ctx()).unwrap_or(u32::MAX).max(1);
    match (args.ctx, wanted) {
        (0, Some(n)) => u32::try_from(n).unwrap_or(u32::MAX).min(most),
        (0, None) => DEFAULT_CTX.min(most),
        (n, _) => n,
    }
}

fn once(
    args: &Args,
    model: &dyn Engine,
    prompt: &str,
    options: &Options,
    stop: &AtomicBool,
    out: &Output,
) -> Result<()> {
    let ids = if args.chat {
        let mut dialogue = Dialogue::new(model, args.system.as_deref())?;
        dialogue.ask(prompt);
        dialogue.prompt()?
    } else {
        tokenize_prompt(model, prompt)?
    };
    let wanted = options.max_tokens.map(|n| ids.len().saturating_add(n));
    // Whatever the usual length, a long prompt leaves room for an answer.
    let wanted = wanted.or((ids.len() > DEFAULT_CTX as usize / 2).then_some(ids.len().saturating_mul(2)));
    let n_ctx = context_length(args, model, wanted);
    let mut session = Session::new(model, n_ctx, super::common::threads(args.threads))?;
    let summary = session.generate(&ids, options, stop, &mut |text| out.piece(text))?;
    out.end(&summary, true)
}

/// Where text and numbers go.
pub struct Output {
    json: bool,
    quiet: bool,
    load: Duration,
    seed: u64,
    converted: Json,
}

impl Output {
    /// A piece of an answer. JSON has the whole, later.
    pub fn piece(&self, text: &str) -> Result<()> {
        if self.json { Ok(()) } else { write_out(text) }
    }

    /// An answer's end. `alone`: no others come.
    pub fn end(&self, summary: &Summary, alone: bool) -> Result<()> {
        if self.json {
            let json = self.json(summary);
            return write_out(&if alone { format!("{json:#}\n") } else { format!("{json}\n") });
        }
        write_out("\n")?;
        if !self.quiet && alone {
            ui::say(&self.sentence(summary));
        }
        Ok(())
    }

    fn json(&self, s: &Summary) -> Json {
        let stop = match &s.end {
            End::StopString(text) => Some(text),
            _ => None,
        };
        json!({
            "text": s.text,
            "finish_reason": s.end.reason(),
            "stop": stop,
            "prompt_tokens": s.prompt_tokens,
            "cached_tokens": s.cached_tokens,
            "generated_tokens": s.generated.len(),
            "seed": self.seed,
            "converted": self.converted,
            "load_seconds": self.load.as_secs_f64(),
            "prompt_seconds": s.prompt_time.as_secs_f64(),
            "prompt_tokens_per_second": s.prompt_rate(),
            "generation_seconds": s.generation_time.as_secs_f64(),
            "generation_tokens_per_second": s.generation_rate(),
        })
    }

    fn sentence(&self, s: &Summary) -> String {
        let rate = |rate: Option<f64>| rate.map(|r| format!(" at {r:.1} tokens/s")).unwrap_or_default();
        let end = match &s.end {
            End::EndOfGeneration(_) => "the model ended".to_string(),
            End::StopString(text) => format!("ended at {text:?}"),
            End::Length => "length reached".to_string(),
            End::ContextFull => "context full (-c gives a longer one)".to_string(),
            End::Interrupted => "interrupted".to_string(),
        };
        format!(
            "{} prompt tokens{}, {} generated{}, {end}; seed {}",
            s.prompt_tokens,
            rate(s.prompt_rate()),
            s.generated.len(),
            rate(s.generation_rate()),
            self.seed
        )
    }
}

fn write_out(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| Error::io("write", "stdout", e))
}
