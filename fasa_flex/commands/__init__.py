"""The subcommands of ``fasa-flex``; `fasa_flex.cli` defines their options."""
