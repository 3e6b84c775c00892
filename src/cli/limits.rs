//! Options that say what a file may demand.

use qconv::limits::{Bound, Limits};

use super::common::parse_size;

/// Bounds on what files may demand before anything is allocated; every command that reads a model has them.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Limits on what a file may demand")]
pub struct LimitArgs {
    /// Longest header of a file, such as 64M [default: 1G]
    #[arg(long = Bound::Header.option(), value_name = "SIZE", value_parser = parse_size, global = true, hide_short_help = true)]
    max_header: Option<u64>,

    /// Longest string in a header [default: 64M]
    #[arg(long = Bound::String.option(), value_name = "SIZE", value_parser = parse_size, global = true, hide_short_help = true)]
    max_string: Option<u64>,

    /// Most tensors, over all shards [default: 1048576]
    #[arg(long = Bound::Tensors.option(), value_name = "N", global = true, hide_short_help = true)]
    max_tensors: Option<u64>,

    /// Most entries of a GGUF file's metadata [default: 65536]
    #[arg(long = Bound::Metadata.option(), value_name = "N", global = true, hide_short_help = true)]
    max_metadata: Option<u64>,

    /// Deepest nesting of arrays in a GGUF file's metadata [default: 2]
    #[arg(long = Bound::Depth.option(), value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64), global = true, hide_short_help = true)]
    max_depth: Option<u32>,

    /// Most shards of a checkpoint [default: 65536]
    #[arg(long = Bound::Shards.option(), value_name = "N", global = true, hide_short_help = true)]
    max_shards: Option<u64>,

    /// Largest config, tokenizer or index [default: 128M]
    #[arg(long = Bound::SideFile.option(), value_name = "SIZE", value_parser = parse_size, global = true, hide_short_help = true)]
    max_side_file: Option<u64>,

    /// Most memory that a running Core ML package takes for its values and states [default: 4G]
    #[arg(long = Bound::Executor.option(), value_name = "SIZE", value_parser = parse_size, global = true, hide_short_help = true)]
    max_executor: Option<u64>,
}

impl LimitArgs {
    /// The limits that are meant.
    pub fn limits(&self) -> Limits {
        let standard = Limits::STANDARD;
        Limits {
            header_bytes: self.max_header.unwrap_or(standard.header_bytes),
            string_bytes: self.max_string.unwrap_or(standard.string_bytes),
            tensors: self.max_tensors.unwrap_or(standard.tensors),
            metadata_entries: self.max_metadata.unwrap_or(standard.metadata_entries),
            array_depth: self.max_depth.unwrap_or(standard.array_depth),
            shards: self.max_shards.unwrap_or(standard.shards),
            side_file_bytes: self.max_side_file.unwrap_or(standard.side_file_bytes),
            executor_bytes: self.max_executor.unwrap_or(standard.executor_bytes),
        }
    }
}
