import SwiftUI

@main
struct ChatApp: App {
  var body: some Scene {
    WindowGroup { ChatView() }
  }
}

struct ChatView: View {
  @StateObject private var conversation = Conversation()
  @State private var draft = ""

  var body: some View {
    VStack {
      ScrollViewReader { list in
        ScrollView {
          LazyVStack(alignment: .leading) {
            ForEach(conversation.messages) { message in
              Text(message.text)
                .textSelection(.enabled)
                .padding(8)
                .frame(maxWidth: .infinity, alignment: .leading)
                .background(message.isUser ? Color.blue.opacity(0.2) : Color.gray.opacity(0.2))
                .cornerRadius(8)
            }
          }
        }
        .onChange(of: conversation.messages.last?.text) { _ in
          list.scrollTo(conversation.messages.last?.id, anchor: .bottom)
        }
      }
      HStack {
        TextField("Message", text: $draft, axis: .vertical)
          .textFieldStyle(.roundedBorder)
        if conversation.isBusy {
          Button("Stop", action: conversation.stop)
        } else {
          Button("Send", action: send)
            .disabled(draft.trimmingCharacters(in: .whitespacesAndNewlines).isEmpty)
        }
      }
    }
    .padding()
  }

  private func send() {
    conversation.send(draft.trimmingCharacters(in: .whitespacesAndNewlines))
    draft = ""
  }
}
