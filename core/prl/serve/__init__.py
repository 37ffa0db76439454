"""An engine over HTTP: the endpoints every engine has, and the client that the rest of a run talks to them with.

    environment workers, controller ──► client ──► application ──► endpoints ──► an `Engine`
    people, with OpenAI's clients ────────────────────┘

    engine        what an engine must be able to do, and what it is asked        requests    the checked questions
    application   routes, the run's token, where it listens                      client      the other end
    generate, columns   tokens in, tokens out                                    chat, events    OpenAI's chat
    control, metrics    weights, pause, abort, statistics                        speech          text and tokens
    body, refusal       strict JSON, errors

Torch-free. The engine process of a plugin builds its engine and serves `application(...)`; docs/plugins.md shows one.
"""
