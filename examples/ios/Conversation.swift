import ExecuTorchLLM
import Foundation

// The released chat format. The runner reads these as tokens and adds none.
private let begin = "<|begin_of_text|>"
private let endOfTurn = "<|eot|>"
private let endOfText = "<|end_of_text|>"
private let user = "<|header_start|>user<|header_end|>\n\n"
private let assistant = "<|header_start|>assistant<|header_end|>\n\n"

struct Message: Identifiable {
  let id = UUID()
  let isUser: Bool
  var text: String
}

/// Messages as the screen shows them. The runner keeps the cache, so that a turn sends it only what is new.
final class Conversation: ObservableObject {
  @Published private(set) var messages: [Message] = []
  @Published private(set) var isBusy = false

  // The runner takes one call at a time, which lasts for the whole answer.
  private let worker = DispatchQueue(label: "runner")
  private var runner: TextRunner?
  private var hasBegun = false

  func send(_ text: String) {
    messages.append(Message(isUser: true, text: text))
    messages.append(Message(isUser: false, text: ""))
    guard let runner = runner ?? makeRunner() else {
      show("[model.pte or tokenizer.json is not in the app: README.md says how to add them.]")
      return
    }
    self.runner = runner
    // The token that ended the last answer has not run.
    let prompt = (hasBegun ? endOfTurn : begin) + user + text + endOfTurn + assistant
    hasBegun = true
    isBusy = true
    worker.async {
      let failure = self.generate(prompt, with: runner)
      DispatchQueue.main.async {
        if let failure {
          // Mostly a full context.
          self.hasBegun = false
          self.show("\n[\(failure.localizedDescription) The conversation was forgotten: send the message again.]")
        }
        self.isBusy = false
      }
    }
  }

  private func generate(_ prompt: String, with runner: TextRunner) -> Error? {
    // Up to the end of the context.
    let config = Config {
      $0.isEchoEnabled = false
      $0.temperature = 0.7
    }
    do {
      try runner.generate(prompt, config) { token in
        if token == endOfTurn || token == endOfText { return }
        DispatchQueue.main.async { self.show(token) }
      }
      return nil
    } catch {
      runner.reset()
      return error
    }
  }

  func stop() {
    runner?.stop()
  }

  private func makeRunner() -> TextRunner? {
    guard let model = Bundle.main.path(forResource: "model", ofType: "pte"),
      let tokenizer = Bundle.main.path(forResource: "tokenizer", ofType: "json")
    else { return nil }
    return TextRunner(modelPath: model, tokenizerPath: tokenizer)
  }

  private func show(_ text: String) {
    messages[messages.count - 1].text += text
  }
}
