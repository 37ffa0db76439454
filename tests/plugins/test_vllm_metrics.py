"""What a page of vLLM's metrics says of a server with several engine cores."""

from __future__ import annotations

from prl_vllm import metrics

PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 5.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
vllm:num_preemptions_total{engine="0",model_name="m"} 2.0
process_open_fds 12.0
"""
INFO = 'vllm:cache_config_info{block_size="16",engine="%d",kv_cache_size_tokens="%s",num_gpu_blocks="100"} 1.0\n'
OLD = 'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0\n'


def test_counts_are_added_up_and_the_fullest_core_counts() -> None:
    read = metrics.read(PAGE)
    assert read["num_requests_running"] == 8.0
    assert read["kv_cache_usage_perc"] == 0.75
    assert read["num_preemptions_total"] == 2.0
    assert "process_open_fds" not in read


def test_room_is_that_of_all_cores_in_tokens() -> None:
    assert metrics.read(PAGE)["kv_tokens"] == 0.0
    assert metrics.read(INFO % (0, "4000") + INFO % (1, "5000"))["kv_tokens"] == 9000.0
    assert metrics.read(INFO % (0, "None"))["kv_tokens"] == 1600.0
    assert metrics.read(OLD)["kv_tokens"] == 1600.0
