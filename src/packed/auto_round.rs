//! AutoRound: the tensors of GPTQ (first version) or of AWQ, under a name of its own.
//!
//! `packing_format` tells which. Source: `auto_round/export/export_to_autoround` of AutoRound.

use serde_json::Value as Json;

use super::{Format, awq, gptq, missing, unsupported};

pub(super) const FORMAT: Format = Format {
    method: "auto-round",
    name: "AutoRound",
    marks: gptq::FORMAT.marks,
    join: |packed| match packed.config.get("packing_format") {
        Some(Json::String(format)) if format == "auto_round:auto_gptq" => gptq::join(packed),
        Some(Json::String(format)) if format == "auto_round:auto_awq" => awq::join(packed),
        Some(other) => Err(unsupported("packing_format", other)
            .hint("\"auto_round:auto_gptq\" and \"auto_round:auto_awq\" are")),
        None => Err(missing("packing_format")),
    },
};
