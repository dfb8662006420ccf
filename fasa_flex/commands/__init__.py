"""The work of subcommands of ``fasa-flex``; `fasa_flex.cli` has their options."""
