"""What model plugins of published families share, apart from torch: sizes, config.json, limits.

`config_json` reads and checks a config.json; `moe` has the fields and sizes of every large mixture of experts;
`deepseek_v3` those of the make of DeepSeek-V3. What is built from such sizes is `prl.blocks.deepseek_v3`.
"""
