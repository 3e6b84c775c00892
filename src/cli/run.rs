//! `qconv run`: lets a GGUF model speak, through the linked llama.cpp.

use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::{SystemTime, UNIX_EPOCH};

use qconv::error::Error;
use qconv::eval::chat::{self, Conversation, Message, TemplateTokens};
use qconv::eval::generate::{End, Options, Sampling, generate, tokenize_prompt};
use qconv::ggml::{Model, ModelOptions, set_verbose};

/// Run a GGUF model: print how it continues a prompt
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The GGUF file; of a split one, the first shard
    pub model: PathBuf,

    /// What to continue, or with --chat, what to ask
    #[arg(short, long)]
    pub prompt: String,

    /// Most tokens to generate
    #[arg(short, long, default_value_t = 128)]
    pub n: usize,

    /// Put the prompt into the model's chat template, as the user's message
    #[arg(long)]
    pub chat: bool,

    /// A system message before the user's
    #[arg(long, requires = "chat")]
    pub system: Option<String>,

    /// Add a LoRA adapter (a GGUF file), so many times (1); can be repeated
    #[arg(long, value_name = "FILE[:SCALE]", value_parser = super::common::parse_scaled)]
    pub lora: Vec<(PathBuf, f32)>,

    /// Threads; all processors by default
    #[arg(short = 'j', long)]
    pub threads: Option<u32>,

    /// Context length in tokens; by default what prompt and answer need
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    pub ctx: u32,

    /// Temperature; 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    pub temp: f32,

    /// Choose among this many likeliest tokens; 0 for all (with --temp)
    #[arg(long, default_value_t = 40)]
    pub top_k: usize,

    /// Choose among the likeliest tokens that reach this probability together (with --temp)
    #[arg(long, default_value_t = 0.95)]
    pub top_p: f32,

    /// Seed of the choice; the same seed gives the same text (with --temp)
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Layers to place on a GPU, where a GPU backend is built in; -1 for all
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    pub gpu_layers: i32,

    /// Show what llama.cpp says
    #[arg(long)]
    pub log: bool,
}

/// Generated text goes to stdout, everything else to stderr. `stop` ends it between two tokens.
///
/// # Errors
/// When the model cannot be loaded or executed, or stdout cannot be written.
pub fn run(args: &Args, stop: &AtomicBool) -> anyhow::Result<()> {
    set_verbose(args.log);
    // Rearranged weights compute faster, and nobody looks at them here.
    let options = ModelOptions {
        use_extra_bufts: true,
        n_gpu_layers: args.gpu_layers,
        adapters: args.lora.clone(),
        ..ModelOptions::default()
    };
    let model = Model::load(&args.model, &options)?;
    let prompt = if args.chat { chat_prompt(&model, args)? } else { args.prompt.clone() };
    let ids = tokenize_prompt(&model, &prompt).map_err(|e| e.at(&args.model))?;
    let threads = super::common::threads(args.threads);
    let sampling = Sampling { temperature: args.temp, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    let options = Options { max_tokens: args.n, n_ctx: args.ctx, threads, sampling };

    let mut out = std::io::stdout().lock();
    let mut closed = false;
    let mut emit = |text: &str| match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(e) => {
            closed = e.kind() == std::io::ErrorKind::BrokenPipe;
            Err(Error::io("write", "stdout", e))
        }
    };
    let result = generate(&model, &ids, &options, stop, &mut emit);
    if closed {
        // Whoever read has seen enough.
        return Ok(());
    }
    let summary = result.map_err(|e| e.at(&args.model))?;
    writeln!(out)?;
    let rate = |n: usize, time: std::time::Duration| n as f64 / time.as_secs_f64().max(1e-9);
    let end = match summary.end {
        End::EndOfGeneration(_) => "the model ended",
        End::Length => "length reached",
        End::ContextFull => "context full",
        End::Stopped => "stopped",
    };
    eprintln!(
        "{} prompt tokens at {:.1} tokens/s, {} generated at {:.1} tokens/s, {end}",
        summary.prompt_tokens,
        rate(summary.prompt_tokens, summary.prompt_time),
        summary.generated.len(),
        rate(summary.generated.len(), summary.generation_time),
    );
    Ok(())
}

fn chat_prompt(model: &Model, args: &Args) -> qconv::Result<String> {
    let template = model.chat_template().ok_or_else(|| {
        Error::unsupported("the model has no chat template")
            .at(&args.model)
            .hint("run without --chat to continue the prompt as plain text")
    })?;
    let tokens = TemplateTokens::of(model);
    let mut messages = Vec::new();
    messages.extend(args.system.as_deref().map(|text| Message::new("system", text)));
    messages.push(Message::new("user", &args.prompt));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    chat::render(&template, &Conversation::new(&messages), &tokens, i64::try_from(now).unwrap_or(0))
        .map_err(|e| e.at(&args.model))
}
